"""`autoglm-lab serve --engine vllm`: the same settings for vLLM, run or printed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

import typer

from autoglm_lab.errors import LabError
from autoglm_lab.policy import MemoryPolicy

_FORMS = ("command", "ray", "kubernetes")


def scale_out(
    engine: str,
    model: str,
    policy: Any,
    budget: str | None,
    device: str | None,
    api_key: str | None,
    form: str,
    where: Mapping[str, Any],
) -> None:
    """Print the command, or a deployment, or become vLLM.

    Args:
        policy: None: the defaults.
        device: the card by name (``"RTX 4090"``) or this machine's, whose size the budget is a share of.
        api_key: goes to vLLM in its environment, where a list of processes does not show it.
        form: ``run``, ``command``, ``ray`` or ``kubernetes``.
        where: of `server.scale_out.Deployment`.

    Raises:
        LabError: another engine or form, a setting that cannot be, or vLLM is not installed.
    """
    if engine != "vllm":
        raise LabError(f"--engine is local or vllm, not {engine!r}; --print goes with vllm")
    if form not in ("run", *_FORMS):
        raise LabError(f"--as is one of {', '.join(_FORMS)}, not {form!r}")
    if policy == "auto":
        raise LabError("--policy auto chooses for this package's engine: give vLLM a file of settings")
    from autoglm_lab.models.loading import outline
    from autoglm_lab.server.scale_out import Deployment, ModelFacts, vllm_command

    settings = policy or MemoryPolicy()
    settings = settings if budget is None else settings.replace(budget=budget)
    facts = ModelFacts.of(outline(model), model)
    command = vllm_command(settings, facts, Deployment(**where, card=_card(device)))
    if form != "run":
        made = {"command": lambda: f"{command}\n", "ray": command.ray_serve, "kubernetes": command.kubernetes}
        typer.echo(made[form](), nl=False)
        return
    typer.echo(str(command))
    words = command.arguments()
    program = shutil.which(words[0])
    if program is None:
        raise LabError("vLLM is not installed here: install it in an environment of its own, or use --print")
    os.execve(program, words, os.environ | ({"VLLM_API_KEY": api_key} if api_key else {}))


def _card(device: str | None) -> int | None:
    from autoglm_lab.memory.planning.device_constants import plan_device

    try:
        found = plan_device(device or "cuda", None, None)
    except LabError:
        if device is not None:
            raise
        return None
    return found.total if found.kind == "cuda" else None
