"""Reclaiming: giving memory that is cached but unused back to the system, and knowing when."""

from __future__ import annotations

import time

from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.memory.shell import forget_last_error, kept_outputs
from autoglm_lab.policy import ReclaimPolicy


class Reclaimer:
    """Gives unused memory back, of every device: by request, every some answers, or when too much is cached."""

    def __init__(self, *accelerators: Accelerator) -> None:
        self._accelerators = accelerators

    def due(self, answers: int, ledger: Ledger, policy: ReclaimPolicy) -> str:
        """Why it is time to reclaim; empty (false) where it is not.

        Args:
            answers: given since the last reclaim.
            ledger: the device now.
            policy: the rules.
        """
        if policy.every_answers is not None and answers >= policy.every_answers:
            return f"every {policy.every_answers} answers"
        cached = ledger.of_kind("allocator cache")
        if policy.cached_share is not None and ledger.total and cached > policy.cached_share * ledger.total:
            return f"more than {100 * policy.cached_share:.0f} % of the device cached"
        return ""

    def reclaim(self, why: str, *, clear_traceback: bool = False) -> Event:
        """Give back what is unused.

        Args:
            why: the cause, for the event.
            clear_traceback: also clear what Python and Jupyter keep alive through the last error's traceback.

        Returns:
            A ``reclaimed`` event with the bytes that really left the process; a negative figure means that it grew
            meanwhile. Outputs of cells that keep tensors alive are named in it, and left alone.
        """
        start = time.perf_counter()
        if clear_traceback:
            forget_last_error()
        first, *others = self._accelerators
        held = [other.reading().process for other in others]
        gained = first.give_back()  # torch empties its caches on all of them at once
        for other, before in zip(others, held, strict=True):
            gained += (before or 0) - (other.reading().process or 0)
        seconds = time.perf_counter() - start
        told = "; ".join(part for part in (why, kept_outputs()) if part)
        return Event(time.time(), "reclaimed", "memory", gained, seconds, told)
