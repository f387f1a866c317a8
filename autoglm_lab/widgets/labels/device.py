"""Words of what shows the whole device: the header, its bar, the live plot and the events."""

from __future__ import annotations

HEADER: dict[str, tuple[str, str]] = {
    "title": ("Workbench", "工作台"),
    "other language": ("中文", "English"),
    "change language": ("切换到中文", "Switch to English"),
    "phase hint": ("What the engine is doing", "引擎正在做什么"),
    "last rate": ("idle · last answer {rate} tok/s", "空闲 · 上次 {rate} tok/s"),
    "closed": ("closed", "已关闭"),
    "disconnected": ("disconnected", "已断开"),
    "disconnected hint": (
        "The kernel does not answer: run the cell again",
        "内核没有响应：请重新运行该单元格",
    ),
}
DEVICE_BAR: dict[str, tuple[str, str]] = {
    "title": ("Memory of the device", "设备内存"),
    "this process": ("{bytes} in this process", "本进程 {bytes}"),
    "of device": ("of {total} · {free} free", "共 {total} · 空闲 {free}"),
    "free hint": ("What anyone could still take", "仍可分配的内存"),
    "source nvml": ("= {total}, as NVML reports", "= {total}，与 NVML 一致"),
    "source psutil": ("= {total}, all memory of this machine", "= {total}，本机全部内存"),
    "beside host": ("{name} {bytes} on host", "{name} {bytes} 在主机内存"),
    "beside disk": ("{name} {bytes} on disk", "{name} {bytes} 在磁盘"),
}
LIVE_PLOT: dict[str, tuple[str, str]] = {
    "title": ("Memory over time", "内存曲线"),
    "window": ("Time window", "时间窗口"),
    "all": ("all", "全部"),
    "pause": ("Pause", "暂停"),
    "pause hint": ("Hold the picture; sampling goes on", "停住画面；采样继续"),
    "go on": ("Go on", "继续"),
    "paused": ("paused", "已暂停"),
    "save": ("Save", "保存"),
    "save hint": ("Save the picture as PNG", "将图保存为 PNG"),
    "axis now": ("now", "现在"),
    "ago": ("{seconds} ago", "{seconds} 前"),
    "waiting": ("waiting for samples…", "等待采样…"),
}
EVENTS: dict[str, tuple[str, str]] = {
    "title": ("Events", "事件"),
    "gained": ("gained {bytes}", "收回 {bytes}"),
}
