"""Every error the package raises on purpose.

::

    LabError
    ├── PolicyError (ValueError)         a setting that does not exist or cannot be
    ├── LoadError                        a model that cannot be loaded, and what would help
    ├── ModuleError                      a module that does not exist or cannot be moved
    │   └── ModuleOffError               a request needs a module that the policy switched off
    ├── MediaError (ValueError)          an image or a sound that cannot be read
    ├── MessageError (ValueError)        messages that are not a conversation
    ├── DatasetError (ValueError)        data that cannot be learnt from
    ├── TrainingError                    a training that cannot begin or go on
    ├── ConversationError                a conversation that is unknown or busy
    ├── ContextLimitError                the prompt does not fit the model or the KV limit
    ├── WireError (ValueError)           JSON of the engine protocol that is not what it should be
    ├── EndpointError                    an endpoint that is not there, refuses, or breaks off
    ├── OutOfMemoryError                 a phase did not fit: needed, had, and settings that would fit
    │   └── AdmissionError               a request was refused untried, since the plan says that it cannot fit
    ├── RankError                        another process, which holds a part of the model, failed or is gone
    └── EngineClosedError                the engine was closed

A message says what was asked, what there is, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoglm_lab.units import format_bytes


class LabError(Exception):
    """The root of the package's errors."""


class PolicyError(LabError, ValueError):
    """A setting that does not exist or cannot be."""


class LoadError(LabError):
    """A model that cannot be loaded."""


class ModuleError(LabError):
    """A module that does not exist, or cannot be moved now."""


class ModuleOffError(ModuleError):
    """A request needs a module that the policy switched off."""

    def __init__(self, module: str, needed_for: str) -> None:
        self.module = module
        super().__init__(
            f"this request needs the module '{module}' ({needed_for}), which the policy keeps off: "
            f"set modules.{module}.residency to 'keep' or 'on-demand', "
            f"for example wb.policy = wb.policy.replace(modules={{'{module}': 'on-demand'}})"
        )


class MediaError(LabError, ValueError):
    """An image or a sound that cannot be read."""


class MessageError(LabError, ValueError):
    """Messages that are not a conversation."""


class DatasetError(LabError, ValueError):
    """Data that cannot be learnt from."""


class TrainingError(LabError):
    """A training that cannot begin, or cannot go on."""


class ConversationError(LabError):
    """A conversation that is unknown, or busy with another turn."""


class ContextLimitError(LabError):
    """The prompt does not fit the model's context or the KV limit of the policy."""


class WireError(LabError, ValueError):
    """JSON of the engine protocol that is not what it should be."""


class EndpointError(LabError):
    """An endpoint that is not there, refuses, or breaks off in the middle of an answer."""


class OutOfMemoryError(LabError):
    """A phase did not fit into memory, also after everything the policy allows was freed.

    Attributes:
        phase: what the engine was doing (``load``, ``encode``, ``prefill``, ``decode``).
        needed: bytes asked for, or None where the allocator did not say.
        had: bytes that were free.
        remedies: settings that would free memory, most effective first.
    """

    def __init__(self, phase: str, needed: int | None, had: int | None, remedies: Sequence[str] = ()) -> None:
        self.phase, self.needed, self.had, self.remedies = phase, needed, had, tuple(remedies)
        advice = "; ".join(self.remedies) or "nothing in the policy would free more: use a smaller input or model"
        figures = f"needed {format_bytes(needed)}, had {format_bytes(had)}"
        super().__init__(f"out of memory in {phase}: {figures}. What would help: {advice}")


class AdmissionError(OutOfMemoryError):
    """A request was refused before it was tried, since the plan says that it cannot fit. ``force=True`` tries it.

    Attributes:
        phase: the one that would not fit.
        needed: bytes that it needs beyond what is held.
        had: bytes that can be had, with what the policy would free.
        remedies: what would fit, mildest first.
    """

    def __init__(self, phase: str, needed: int, had: int, remedies: Sequence[str] = ()) -> None:
        super().__init__(phase, needed, had, remedies)
        advice = (
            "; ".join(self.remedies) or "nothing in the policy frees enough: use a shorter prompt or a smaller image"
        )
        message = (
            f"refused before it was tried: {phase} needs {format_bytes(needed)} more, and {format_bytes(had)} can be "
            f"had. What would fit: {advice}. force=True tries it all the same"
        )
        self.args = (message,)


class RankError(LabError):
    """Another process, which holds a part of the model, failed in a step, or is gone."""


class EngineClosedError(LabError):
    """The engine was closed; load the model again."""
