"""CUDA's virtual memory, called through the driver: addresses that are reserved once and backed when they are needed.

The calls and structures are those of CUDA's driver API, section "Virtual Memory Management".
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from autoglm_lab.errors import ModuleError

_PINNED, _ON_DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0
_OUT_OF_MEMORY = 2


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Allocation(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


_SIGNATURES: dict[str, list[Any]] = {
    "cuMemGetAllocationGranularity": [ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(_Allocation), ctypes.c_int],
    "cuMemAddressReserve": [
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_uint64,
        ctypes.c_uint64,
    ],
    "cuMemCreate": [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t, ctypes.POINTER(_Allocation), ctypes.c_uint64],
    "cuMemMap": [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint64],
    "cuMemSetAccess": [ctypes.c_uint64, ctypes.c_size_t, ctypes.POINTER(_Access), ctypes.c_size_t],
    "cuMemUnmap": [ctypes.c_uint64, ctypes.c_size_t],
    "cuMemRelease": [ctypes.c_uint64],
    "cuMemAddressFree": [ctypes.c_uint64, ctypes.c_size_t],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
}
_driver_library: ctypes.CDLL | None = None
_ready_in_thread = threading.local()


def _driver() -> ctypes.CDLL:
    global _driver_library  # noqa: PLW0603 - one library for the process, opened on first use
    if _driver_library is None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
            for name, arguments in _SIGNATURES.items():
                getattr(library, name).argtypes = arguments
                getattr(library, name).restype = ctypes.c_int
        except (OSError, AttributeError) as error:
            raise ModuleError(f"the CUDA driver cannot be called for virtual memory: {error}") from None
        _driver_library = library
    return _driver_library


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    code = int(getattr(driver, name)(*arguments))
    if code == 0:
        return
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    message = f"{name} failed with {code}: {(text.value or b'unknown error').decode()}"
    if code == _OUT_OF_MEMORY:
        raise MemoryError(message)
    raise ModuleError(message)


class Export:
    """A region as `torch.as_tensor` takes it. It lives exactly as long as a tensor views the region."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
            "strides": None,
        }


class DriverMemory:
    """The memory of one GPU as the driver hands it out. It calls nothing that waits for the device.

    Attributes:
        granularity: bytes that sizes and addresses are multiples of (2 MiB on today's cards).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        location = _Location(_ON_DEVICE, device.index or 0)
        self._allocation = _Allocation(_PINNED, 0, location, None, _Flags())
        self._access = _Access(location, _READ_WRITE)
        self._make_context_current()
        granularity = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._allocation), _MINIMUM)
        self.granularity = int(granularity.value)

    def round_up(self, nbytes: int) -> int:
        """``nbytes`` as whole granules, at least one."""
        return max(1, -(-nbytes // self.granularity)) * self.granularity

    def reserve(self, nbytes: int) -> int:
        """Addresses for ``nbytes``, without memory behind them. Returns the first."""
        self._make_context_current()
        address = ctypes.c_uint64()
        _call("cuMemAddressReserve", ctypes.byref(address), nbytes, 0, 0, 0)
        return int(address.value)

    def free(self, address: int, nbytes: int) -> None:
        """Give reserved addresses back; nothing may be mapped there."""
        _call("cuMemAddressFree", address, nbytes)

    def map(self, address: int, nbytes: int) -> int:
        """Put memory behind reserved addresses. Returns a handle for `unmap`.

        Raises:
            MemoryError: the device has none left; nothing is mapped then.
        """
        self._make_context_current()
        handle = ctypes.c_uint64()
        _call("cuMemCreate", ctypes.byref(handle), nbytes, ctypes.byref(self._allocation), 0)
        try:
            _call("cuMemMap", address, nbytes, 0, handle.value, 0)
        except BaseException:
            _call("cuMemRelease", handle.value)
            raise
        try:
            _call("cuMemSetAccess", address, nbytes, ctypes.byref(self._access), 1)
        except BaseException:
            self.unmap(address, nbytes, int(handle.value))
            raise
        return int(handle.value)

    def unmap(self, address: int, nbytes: int, handle: int) -> None:
        """Take the memory away. Kernels that may still use it must have ended: unmapping does not wait for them."""
        self._make_context_current()
        _call("cuMemUnmap", address, nbytes)
        _call("cuMemRelease", handle)

    def tensor(self, export: Export) -> Tensor:
        """A ``uint8`` tensor on exported addresses. The first one must be backed."""
        return torch.as_tensor(export, device=self.device)

    def _make_context_current(self) -> None:
        # A thread's first call of the runtime makes the device's context current in it, which the driver calls need.
        if self.device not in _ready_in_thread.__dict__.setdefault("devices", set()):
            torch.cuda.mem_get_info(self.device)
            _ready_in_thread.devices.add(self.device)
