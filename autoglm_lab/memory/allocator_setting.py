"""The one setting of torch's CUDA allocator that counts only before it has memory: expandable segments."""

from __future__ import annotations

import os
from typing import Literal

import torch

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ON = "expandable_segments:True"


def expand_segments(kind: Literal["cuda", "cpu"] | None = None) -> str:
    """Let the allocator grow its segments instead of adding new ones, which fragments less.

    Other settings of the environment stay. Once it is on, again is no harm.

    Args:
        kind: of the device that is used; None: a GPU where there is one.

    Returns:
        Why it has no effect, and what to do; empty where it has.
    """
    if kind == "cpu" or not torch.cuda.is_available():
        return "reclaim.expandable_segments has no effect on a CPU: it is a setting of CUDA's allocator"
    settings = _settings()
    if _ON in settings:
        return ""
    if torch.cuda.is_initialized() and any(map(torch.cuda.memory_reserved, range(torch.cuda.device_count()))):
        return (
            "reclaim.expandable_segments comes too late: torch has memory in this process. Restart the kernel and load "
            f"with this policy before anything else uses the GPU, or set {_NAMES[0]}={_ON} in its environment"
        )
    kept = [setting for setting in settings if not setting.startswith("expandable_segments:")]
    text = ",".join([*kept, _ON])
    for name in _NAMES:
        if name in os.environ or name == _NAMES[0]:
            os.environ[name] = text
    _tell(text)
    return ""


def _tell(text: str) -> None:
    """An allocator that has read its environment, as it has where CUDA has started; importing torchao starts it."""
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # noqa: SLF001 - since torch 2.11
    (tell or torch.cuda.memory._set_allocator_settings)(text)  # noqa: SLF001


def _settings() -> list[str]:
    """The settings of the environment, one by one. A setting in brackets holds commas of its own."""
    text = next((os.environ[name] for name in _NAMES if os.environ.get(name)), "")
    found, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            found.append(text[start:index].strip())
            start = index + 1
    return [setting for setting in [*found, text[start:].strip()] if setting]
