"""One model on several devices: which they are, and how much of it each gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autoglm_lab.errors import LabError, PolicyError
from autoglm_lab.memory.accelerator import Accelerator, open_accelerator
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat
from autoglm_lab.memory.planning.device_constants import plan_device
from autoglm_lab.memory.planning.planner import planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.loading import Outline, Resolved
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.models.spread import Load, Spread, balanced, mapped
from autoglm_lab.policy import MemoryPolicy

Devices = int | Sequence[str] | Mapping[str, str | int]
"""How many GPUs, their names, or a device map as accelerate's."""


def open_devices(devices: Devices) -> tuple[Accelerator, ...]:
    """The devices that a model is to lie on, opened; the first is the one that a prompt comes to.

    Raises:
        LabError: one does not exist here, is named twice, or is no GPU where there are several.
    """
    if isinstance(devices, int):
        count = torch.cuda.device_count()
        if not 1 <= devices <= count:
            raise LabError(f"devices={devices} asks for that many GPUs, and torch sees {count} here")
        devices = [f"cuda:{index}" for index in range(devices)]
    named = list(devices.values()) if isinstance(devices, Mapping) else list(devices)
    wanted = [torch.device(f"cuda:{one}" if isinstance(one, int) else one) for one in named]
    wanted = [torch.device("cuda", one.index or 0) if one.type == "cuda" else one for one in wanted]
    if isinstance(devices, Mapping):
        wanted = list(dict.fromkeys(wanted))
    if not wanted:
        raise LabError("devices is empty: name at least one, as in devices=['cuda:0', 'cuda:1']")
    twice = next((one for one in wanted if wanted.count(one) > 1), None)
    if twice is not None:
        raise LabError(f"devices names {twice} twice: a model lies on each once")
    if len(wanted) > 1 and any(one.type != "cuda" for one in wanted):
        raise LabError(
            "a model lies on several GPUs, or on one device: what does not fit on a GPU stays on the host by "
            "policy.placement.host_bytes"
        )
    return tuple(open_accelerator(one) for one in wanted)


def spread_over(
    resolved: Resolved,
    accelerators: Sequence[Accelerator],
    policy: MemoryPolicy,
    workload: Workload | None,
    device_map: Mapping[str, str | int] | None,
) -> Spread | None:
    """Which part of the model lies on which device; None: there is one device.

    Weights, the keys and values of the workload, and an encoder at work are counted, so that the fullest device is as
    empty as it can be.

    Raises:
        LoadError: there are more devices than layers, or the device map leaves something out.
        PolicyError: the policy keeps keys and values on the host, which several devices do not.
    """
    if len(accelerators) == 1:
        return None
    if policy.kv.place == "host":
        raise PolicyError("kv.place='host' is for one device: on several, keys and values lie beside their layers")
    if device_map is not None:
        return mapped(resolved.model, device_map)
    devices = [accelerator.device for accelerator in accelerators]
    return balanced(resolved.model, devices, _load(resolved, policy, workload or Workload(), accelerators[0]))


def _load(resolved: Resolved, policy: MemoryPolicy, workload: Workload, accelerator: Accelerator) -> Load:
    form = PageFormat.of(resolved.config, resolved.dtype, policy.kv.precision)
    tokens = workload.context + workload.new_tokens
    tokens = tokens if policy.kv.max_tokens is None else min(tokens, policy.kv.max_tokens)
    pages = -(-tokens // PAGE_TOKENS) * workload.conversations
    layer = 0 if form is None else form.layer_nbytes * pages
    if not any(spec.name == "vision" for spec in anatomy(resolved.model)):
        return Load(layer)
    seen = Workload(workload.context, workload.new_tokens, max(1, workload.images), workload.image_size)
    shapes = Outline(
        resolved.name, skeleton(resolved.config, resolved.dtype), resolved.dtype, lambda: resolved.processor
    )
    plan = planner(shapes, plan_device(None, None, accelerator)).plan(policy, seen, search=False)
    peaks = {phase.name: phase.of_kind("activations") for phase in plan.phases}
    return Load(layer, first=max(0, peaks.get("encode", 0) - peaks.get("prefill", 0)))
