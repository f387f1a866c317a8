"""Words of the panels for the budget and for taking the settings away."""

from __future__ import annotations

BUDGET: dict[str, tuple[str, str]] = {
    "title": ("Budget and reclaim", "预算与回收"),
    "card": ("card", "显存"),
    "budget": ("Budget", "预算"),
    "budget hint": (
        "Bytes this process may use, such as 24GiB or 800MiB",
        "本进程可用的内存，例如 24GiB 或 800MiB",
    ),
    "pretend": (
        "Pretend to be a {n} GiB card, which offers {bytes}",
        "假装是一张 {n} GiB 的卡，实际可用 {bytes}",
    ),
    "offers": ("a {n} GiB card offers {bytes}", "{n} GiB 的卡可用 {bytes}"),
    "context takes": ("context takes {bytes}, leaves {left}", "上下文占 {bytes}，剩 {left}"),
    "still free": ("{bytes} still free", "尚余 {bytes}"),
    "over by": ("{bytes} over", "超出 {bytes}"),
    "host": ("host", "主机"),
    "half": ("half of it", "一半"),
    "of pinned": ("of pinned memory", "锁页内存"),
    "pinned": ("Most pinned memory", "锁页内存上限"),
    "pinned hint": (
        "Most page-locked host memory for parked modules; what is beyond is pageable; empty: half of the host's",
        "休眠模块可用的锁页主机内存上限，超出部分可分页；留空为主机内存的一半",
    ),
    "traceback": ("clear the last traceback too", "同时清除上次的报错现场"),
    "traceback hint": (
        "A reclaim also clears what Jupyter keeps alive through the last error",
        "回收时同时清除 Jupyter 因上次错误而保留的对象",
    ),
    "expandable_segments": ("expandable segments", "可扩展段"),
    "expandable_segments hint": (
        "Let CUDA's allocator grow its segments; it counts only when set before anything lies on the GPU",
        "让 CUDA 分配器的段可增长；须在 GPU 上尚无数据时设置才有效",
    ),
    "real": ("all", "全部"),
    "real hint": ("No budget: the whole device", "不设预算：整个设备"),
    "reclaim": ("reclaim", "回收"),
    "every": ("every", "每"),
    "answers": ("answers,", "次回答，"),
    "or over": ("or over", "或缓存超过"),
    "% cached": ("% cached", "%"),
    "every_answers": ("Reclaim after so many answers", "每隔多少次回答回收"),
    "every_answers hint": (
        "Give unused memory back after so many answers; empty: never by count",
        "每隔若干次回答归还未用内存；留空则不按次数",
    ),
    "cached_share": ("Reclaim over this share of the device", "缓存占设备的比例"),
    "cached_share hint": (
        "Give unused memory back when the allocator caches more than this share of the device; empty: never",
        "分配器缓存超过该比例时归还；留空则不按比例",
    ),
    "now": ("Reclaim", "回收"),
    "now hint": ("Give unused memory back to the system now", "立即把未用内存归还系统"),
    "reclaiming": ("reclaiming…", "回收中…"),
    "not yet": ("", ""),
    "gave back": ("gave back {bytes}", "已归还 {bytes}"),
}
EXPORT: dict[str, tuple[str, str]] = {
    "title": ("Take it away", "导出"),
    "policy": ("Policy", "策略"),
    "policy hint": ("These settings as YAML", "以 YAML 表示的当前设置"),
    "python hint": ("The same in Python", "等价的 Python 代码"),
    "copy": ("Copy", "复制"),
    "copy hint": ("Copy to the clipboard", "复制到剪贴板"),
    "copied": ("Copied", "已复制"),
    "defaults": ("# every setting is at its default", "# 所有设置均为默认值"),
}
