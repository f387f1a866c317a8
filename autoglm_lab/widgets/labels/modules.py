"""Words of the modules' panel, in English and Chinese."""

from __future__ import annotations

from autoglm_lab.costs import cost_of

MODULES: dict[str, tuple[str, str]] = {
    "title": ("Modules", "模块"),
    "residency": ("residency", "驻留"),
    "residency keep": ("keep", "常驻"),
    "residency keep hint": ("Keep on the device", "常驻设备"),
    "residency on-demand": ("on demand", "按需"),
    "residency on-demand hint": (
        "Wake when a request needs it, park when it has been idle",
        "请求需要时唤醒，空闲后休眠",
    ),
    "residency off": ("off", "关闭"),
    "residency off hint": ("Park it, and refuse requests that need it", "休眠，并拒绝需要它的请求"),
    "on device": ("on device", "在设备"),
    "on host": ("on host", "在主机"),
    "on disk": ("on disk", "在磁盘"),
    "moving": ("moving…", "移动中…"),
    "pinned": ("pinned", "锁页"),
    "pageable": ("pageable, slower", "可分页，较慢"),
    "copy on host": ("host copy: {kind}", "主机副本：{kind}"),
    "park": ("park", "休眠"),
    "wake": ("wake", "唤醒"),
    "park now": ("Park {name} now", "立即休眠 {name}"),
    "wake now": ("Wake {name} now", "立即唤醒 {name}"),
    "park to": ("park to", "休眠到"),
    "place auto": ("auto", "自动"),
    "place auto hint": (
        "Host memory beside a GPU, disk where the device is the host",
        "有 GPU 时为主机内存，否则为磁盘",
    ),
    "place host": ("host", "主机"),
    "place host hint": ("Pinned host memory: back in milliseconds", "锁页主机内存：毫秒级唤醒"),
    "place disk": ("disk", "磁盘"),
    "place disk hint": ("The safetensors file: frees host memory too", "safetensors 文件：也释放主机内存"),
    "precision": ("text weights", "文本权重"),
    "weights model": ("as loaded", "原精度"),
    "weights model hint": ("As the files have them, nothing lost", "与文件一致，无损失"),
    "weights int8": ("int8", "int8"),
    "weights int8 hint": ("About half of bfloat16 (lossy)", "约为 bfloat16 的一半（有损）"),
    "weights int4": ("int4", "int4"),
    "weights int4 hint": (
        "Layers in about 0.28 of bfloat16, embeddings and head in int8 (lossy)",
        "各层约为 bfloat16 的 0.28，嵌入与输出头为 int8（有损）",
    ),
    "cost int8": (cost_of("weights int8"), cost_of("weights int8", "zh")),
    "cost int4": (cost_of("weights int4"), cost_of("weights int4", "zh")),
    "next load frees": ("from the next load, frees {bytes}: {load}", "下次加载时生效，释放 {bytes}：{load}"),
    "next load takes": ("from the next load, takes {bytes} more: {load}", "下次加载时生效，多占 {bytes}：{load}"),
    "after": ("after", "空闲"),
    "s idle": ("s idle", "秒后"),
    "keep alive": (
        "Seconds that an on-demand module stays after its last use",
        "按需模块在最后一次使用后保留的秒数",
    ),
}
