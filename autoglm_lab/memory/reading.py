"""One reading of a device: what is held on it, by whom, at one time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """The figures of one device at one time, in bytes.

    Attributes:
        total: of the device; on CPU the machine's, or the cgroup's limit where that is lower.
        free: what anyone could still take.
        used: held by all processes, without what the driver keeps to itself.
        process: held by this process; None: the machine hides it.
        driver_reserved: kept by the driver; None: not told.
        allocated: in tensors of torch's device allocator; None on CPU.
        reserved: held by that allocator, allocated or cached; None on CPU.
        slabs: held by weights and pages outside that allocator.
    """

    time: float
    total: int
    free: int
    used: int
    process: int | None
    driver_reserved: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    slabs: int = 0


@dataclass(frozen=True)
class Counters:
    """What this process's own counters say of one device, in bytes: nothing is asked of the driver or the kernel.

    Two that are equal, and not `moving`, tell that nothing of ours changed in between.

    Attributes:
        slabs: held by weights and pages outside torch's allocator.
        allocated, reserved: as in `Reading`; 0 on CPU.
        moves: how many times memory outside the allocator was taken or given back.
        moving: whether some is being taken or given back right now.
    """

    slabs: int
    allocated: int = 0
    reserved: int = 0
    moves: int = 0
    moving: bool = False
