"""Reclaiming: giving memory that is cached but unused back to the system, and knowing when."""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any

from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.policy import ReclaimPolicy


class Reclaimer:
    """Gives unused memory back: by request, every some answers, or when too much is cached."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

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
            meanwhile.
        """
        start = time.perf_counter()
        if clear_traceback:
            forget_last_error()
        gained = self._accelerator.give_back()
        return Event(time.time(), "reclaimed", "memory", gained, time.perf_counter() - start, why)


def forget_last_error() -> None:
    """Clear the frames of the last uncaught error, whose variables would stay alive with it."""
    kept = [getattr(sys, "last_exc", None), getattr(sys, "last_value", None)]
    shell = _shell()
    if shell is not None:
        kept.append(getattr(shell, "_last_traceback", None))
    for error in kept:
        if isinstance(error, BaseException):
            traceback.clear_frames(error.__traceback__)
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    if shell is not None:
        setattr(shell, "_last_traceback", None)  # noqa: B010 - IPython has no public way


def _shell() -> Any:
    """IPython's shell, where there is one; never imports IPython."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None
