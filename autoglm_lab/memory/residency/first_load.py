"""The first load of a model: whether it fits, told before anything is read, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.residency.module_residency import ModuleResidency
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import MiB, format_bytes

_ROUND = 10 * MiB


class Far:
    """How far a load is: the module that is coming, and the bytes that came. Any thread may ask."""

    def __init__(self, modules: Sequence[ModuleResidency]) -> None:
        self._modules = modules

    def __call__(self) -> tuple[str, int]:
        came = [(module.name, module.filled, module.nbytes) for module in self._modules]
        coming = [name for name, filled, nbytes in came if 0 < filled < nbytes]
        return ", ".join(coming), sum(filled for _, filled, _ in came)


def expected(modules: Sequence[ModuleResidency], policy: MemoryPolicy) -> int:
    """Bytes that a load under ``policy`` reads."""
    return sum(module.nbytes for module in modules if _comes(module, policy) or _is_staged(module, policy))


def check_room(modules: Sequence[ModuleResidency], policy: MemoryPolicy, accelerator: Accelerator) -> None:
    """Refuse a load whose weights do not fit, before it begins. What runs on them later is the plan's to tell.

    A model that this process holds already is not judged: its weights are on the device in any case.

    Raises:
        OutOfMemoryError: by how much, and what would fit.
    """
    coming = [module for module in modules if _comes(module, policy) and not module.backing.held]
    needed, had = sum(module.slab_bytes for module in coming), accelerator.headroom()
    if needed > had:
        raise OutOfMemoryError("load", needed, max(0, had), list(_remedies(coming, needed, had, accelerator)))


def _remedies(coming: Sequence[ModuleResidency], needed: int, had: int, accelerator: Accelerator) -> list[str]:
    found = []
    spare = _fewest(coming, needed - had)
    if spare:
        settings = ", ".join(f"'{module.name}': 'on-demand'" for module in spare)
        left = needed - sum(module.slab_bytes for module in spare)
        found.append(f"modules={{{settings}}} (needs {format_bytes(left)} until they are asked for)")
    if all(module.dtype == "float32" for module in coming) and needed // 2 <= had:
        found.append(f"dtype='bfloat16' (needs {format_bytes(needed // 2)})")
    if accelerator.budget is None:
        found.append("end other programs that use this device")
    else:
        enough = accelerator.budget + needed - max(0, had)
        found.append(f"raise budget={format_bytes(-(-enough // _ROUND) * _ROUND)!r}")
    return [*found, "policy='auto' takes the best settings that fit, or says that none do"]


def _fewest(coming: Sequence[ModuleResidency], missing: int) -> tuple[ModuleResidency, ...]:
    """The fewest encoders, small ones first, whose absence makes room; empty: no such."""
    encoders = sorted((one for one in coming if one.name in ("vision", "audio")), key=lambda one: one.slab_bytes)
    for count in range(1, len(encoders) + 1):
        for some in combinations(encoders, count):
            if sum(module.slab_bytes for module in some) >= missing:
                return some
    return ()


def _comes(module: ModuleResidency, policy: MemoryPolicy) -> bool:
    return module.at != "device" and (policy.module(module.name).residency == "keep" or module.backing.held)


def _is_staged(module: ModuleResidency, policy: MemoryPolicy) -> bool:
    part = policy.module(module.name)
    return module.at == "disk" and part.residency == "on-demand" and module.target(part.park_to) == "host"
