"""The phase "encode": from when a forward enters an encoder until it leaves it, wherever it was called from."""

from __future__ import annotations

import contextlib
from typing import Any

from autoglm_lab.engine.state import EngineState
from autoglm_lab.memory.residency.residency import Residency


def mark_encoding(residency: Residency, state: EngineState) -> list[Any]:
    """Let the engine know when a forward is inside an encoder, so that its peak is told apart from the prefill's, and
    what the driver takes for an encoder's kernels is off the allocator's cap before the decoder goes on.

    Returns:
        The hooks that do it.
    """
    hooks: list[Any] = []
    growing = contextlib.ExitStack()

    def begin(*_: Any) -> None:
        if state.phase == "prefill":
            state.enter("encode", *state.peaks)
            growing.enter_context(state.growth("kernels of encoders"))

    def end(*_: Any) -> None:
        growing.close()  # whatever the phase is by now: an open bracket keeps room free of the budget
        if state.phase == "encode":
            state.enter("prefill", *state.peaks)

    for spec in residency.specs:
        if spec.name in ("vision", "audio"):
            for root in spec.roots:
                encoder = residency.model.get_submodule(root)
                hooks.append(encoder.register_forward_pre_hook(begin))
                hooks.append(encoder.register_forward_hook(end, always_call=True))
    return hooks
