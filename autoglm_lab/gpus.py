"""The GPUs of this machine and how they are linked, as NVML tells it: no torch, no CUDA context."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from autoglm_lab.units import format_bytes

# nvmlGpuP2PCapsIndex_t; the binding's own constants for the first two are tuples by mistake.
_P2P_READ, _P2P_WRITE, _P2P_NVLINK = 0, 1, 2


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        total, used: bytes; ``used`` is by all processes, without what the driver reserves.
        reserved: bytes that the driver keeps for itself; None where NVML is too old to say.
        compute: compute capability, such as ``9.0``.
        sees_processes: NVML tells how much single processes use.
        mig: the device is split into instances (MIG).
    """

    index: int
    name: str
    total: int
    used: int
    reserved: int | None
    compute: str
    sees_processes: bool
    mig: bool

    def __str__(self) -> str:
        reserved = f", driver keeps {format_bytes(self.reserved)}" if self.reserved is not None else ""
        split = ", split by MIG" if self.mig else ""
        return (
            f"{self.name}, {format_bytes(self.total)}, {format_bytes(self.used)} used{reserved}, "
            f"compute {self.compute}{split}"
        )


@dataclass(frozen=True)
class Link:
    """How two GPUs reach each other.

    Attributes:
        first, second: such as ``GPU 0``, in NVML's order: that of the PCI bus, which CUDA's need not be.
        path: what lies between them: one PCIe switch, the CPU, another socket.
        peer_access: reads and writes of the other's memory are possible (P2P).
        nvlink: that goes over NVLink.
        lanes: active NVLink connections of the first; 0 without NVLink.
    """

    first: str
    second: str
    path: str
    peer_access: bool
    nvlink: bool
    lanes: int

    def __str__(self) -> str:
        if self.nvlink:
            return f"NVLink, {self.lanes} links, P2P"
        return f"{self.path}, {'P2P' if self.peer_access else 'no P2P: copies go through the host'}"


@dataclass(frozen=True)
class Survey:
    """What NVML told; ``trouble`` and ``remedy`` say why it told nothing."""

    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    driver: str = ""
    cuda: str = ""
    trouble: str = ""
    remedy: str = ""


def survey() -> Survey:
    """Ask NVML for the devices, the driver and the links. Never raises."""
    try:
        import pynvml as nvml
    except ImportError:
        return Survey(trouble="its Python binding is not installed", remedy="pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Survey(
            trouble=f"no NVIDIA driver answers ({error})",
            remedy="without an NVIDIA GPU nothing; else install its driver, or give the container the GPUs",
        )
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return Survey(
            devices=tuple(_device(nvml, index, handle) for index, handle in enumerate(handles)),
            links=tuple(_link(nvml, handles, *pair) for pair in itertools.combinations(range(len(handles)), 2)),
            driver=str(nvml.nvmlSystemGetDriverVersion()),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        )
    except nvml.NVMLError as error:
        return Survey(trouble=f"the driver answers with an error: {error}", remedy="see whether nvidia-smi works")
    finally:
        nvml.nvmlShutdown()


def _device(nvml: Any, index: int, handle: Any) -> Device:
    memory, reserved = _memory(nvml, handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        total=int(memory.total),
        used=int(memory.used),
        reserved=reserved,
        compute=f"{major}.{minor}",
        sees_processes=_sees_processes(nvml, handle),
        mig=_mig(nvml, handle),
    )


def _memory(nvml: Any, handle: Any) -> tuple[Any, int | None]:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError, AttributeError):
        return nvml.nvmlDeviceGetMemoryInfo(handle), None
    return memory, int(memory.reserved)


def _sees_processes(nvml: Any, handle: Any) -> bool:
    """False where a running process is listed without its memory, or the list is refused. An idle GPU tells nothing."""
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return False
    return all(process.usedGpuMemory is not None for process in processes)


def _mig(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return False
    return bool(current)


def _link(nvml: Any, handles: list[Any], first: int, second: int) -> Link:
    one, other = handles[first], handles[second]

    def capable(what: int) -> bool:
        try:
            return bool(nvml.nvmlDeviceGetP2PStatus(one, other, what) == nvml.NVML_P2P_STATUS_OK)
        except nvml.NVMLError:
            return False

    nvlink = capable(_P2P_NVLINK)
    return Link(
        first=f"GPU {first}",
        second=f"GPU {second}",
        path=_path(nvml, one, other),
        peer_access=capable(_P2P_READ) and capable(_P2P_WRITE),
        nvlink=nvlink,
        lanes=_lanes(nvml, one) if nvlink else 0,
    )


def _path(nvml: Any, one: Any, other: Any) -> str:
    names = {
        nvml.NVML_TOPOLOGY_INTERNAL: "on one board",
        nvml.NVML_TOPOLOGY_SINGLE: "through one PCIe switch",
        nvml.NVML_TOPOLOGY_MULTIPLE: "through several PCIe switches",
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: "through a PCIe host bridge",
        nvml.NVML_TOPOLOGY_NODE: "through the CPU",
        nvml.NVML_TOPOLOGY_SYSTEM: "through another CPU socket",
    }
    try:
        return names.get(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other), "an unknown path")
    except nvml.NVMLError:
        return "a path that NVML does not tell"


def _lanes(nvml: Any, handle: Any) -> int:
    active = 0
    for lane in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            active += bool(nvml.nvmlDeviceGetNvLinkState(handle, lane) == nvml.NVML_FEATURE_ENABLED)
        except nvml.NVMLError:
            break
    return active
