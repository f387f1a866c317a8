"""autoglm_lab: a workbench for the GPU memory of modular multimodal language models.

The public names are imported on first use, so that ``import autoglm_lab`` stays light: it loads neither torch nor
plotly nor jupyter.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load": "opening",
    "attach": "opening",
    "connect": "opening",
    "plan": "opening",
    "serve": "serving",
    "Workbench": "workbench",
    "RemoteWorkbench": "remote_workbench",
    "MemoryPolicy": "policy",
    "presets": "models.catalog",
    "Ledger": "memory.ledger",
    "Plan": "memory.planning.plan",
    "Sampler": "memory.sampler",
    "Turn": "engine.protocol",
    "Workload": "memory.planning.workload",
    "Answer": "engine.protocol",
    "LabError": "errors",
    "OutOfMemoryError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from autoglm_lab.engine.protocol import Answer, Turn
    from autoglm_lab.errors import LabError, OutOfMemoryError
    from autoglm_lab.memory.ledger import Ledger
    from autoglm_lab.memory.planning.plan import Plan
    from autoglm_lab.memory.planning.workload import Workload
    from autoglm_lab.memory.sampler import Sampler
    from autoglm_lab.models.catalog import presets
    from autoglm_lab.opening import attach, connect, load, plan
    from autoglm_lab.policy import MemoryPolicy
    from autoglm_lab.remote_workbench import RemoteWorkbench
    from autoglm_lab.serving import serve
    from autoglm_lab.workbench import Workbench


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(shell: Any) -> None:
    """Bring ``%%vram`` into an IPython session: what ``%load_ext autoglm_lab`` calls."""
    from autoglm_lab.magic import VramMagic

    unload_ipython_extension(shell)
    shell.autoglm_lab_vram = VramMagic(shell)
    shell.autoglm_lab_vram.register()


def unload_ipython_extension(shell: Any) -> None:
    """Take ``%%vram`` away again."""
    magic = getattr(shell, "autoglm_lab_vram", None)
    if magic is not None:
        magic.unregister()
        del shell.autoglm_lab_vram
