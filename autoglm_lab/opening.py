"""How a workbench comes about, and what is known before: `load`, `attach`, `plan`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from autoglm_lab.engine.parallel.ranks import start_ranks
from autoglm_lab.engine.policy_change import check_modules
from autoglm_lab.errors import LabError, LoadError, PolicyError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.allocator_setting import expand_segments
from autoglm_lab.memory.planning.device_constants import plan_device
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.plan_choice import Choice, choose
from autoglm_lab.memory.planning.planner import planner
from autoglm_lab.memory.planning.rounded_outline import outline_in
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.loading import Outline, Resolved, adopt, outline, resolve
from autoglm_lab.models.precision import keep_in, spelled_out
from autoglm_lab.models.rank_model import take_share
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.progress import visible
from autoglm_lab.remote_workbench import RemoteWorkbench
from autoglm_lab.spreading import Devices, open_devices, spread_over
from autoglm_lab.workbench import Workbench


def load(
    source: str | Path | PreTrainedConfig = "autoglm-tiny",
    *,
    policy: MemoryPolicy | Literal["auto"] | None = None,
    budget: int | str | None = None,
    workload: Workload | None = None,
    weights: str | Path | None = None,
    dtype: str = "auto",
    quantize: str | Mapping[str, str] | None = None,
    device: str | None = None,
    devices: Devices | None = None,
    tensor_parallel: int = 1,
    seed: int = 0,
    allow: str | Collection[str] = (),
    progress: bool | None = None,
) -> Workbench:
    """Load a model under memory control.

    Args:
        source: a preset (``autoglm-tiny``, ``autoglm-article``, ``autoglm-phone-9b``), a folder of safetensors, a hub
            id (fetched where the local cache lacks it; ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` hold), or a
            configuration object.
        policy: every setting; None: the defaults; ``"auto"``: the best that fits ``workload``, see `plan_choice`.
        budget: bytes that the process may use, ``"24GiB"`` too; None: the policy's.
        workload: what ``"auto"`` is to fit; None: a prompt of 8,192 tokens and an answer of 256.
        weights: ``"dummy"`` for made-up weights of the true shapes; None: the source's own.
        dtype: ``auto`` (float32 on a CPU, the file's on a GPU), ``float32``, ``bfloat16`` or ``float16``.
        quantize: precision of the weights by module, such as ``{"text": "int4", "head": "int8"}``, or ``"int8"`` or
            ``"int4"``: of the text, with the head in int8. It goes into the policy (see `ModulePolicy`); weights are
            quantised while they are read. ``"auto"``, with ``policy="auto"``: whatever fits, where nothing exact does.
        device: ``cuda:0``, ``cpu`` …; None: the first GPU, else the CPU.
        devices: several GPUs in its place: how many, their names, or a device map as accelerate's. Each gets a run of
            layers with their keys and values, so that the fullest is as empty as it can be with ``workload`` under
            way; a budget holds for each of them.
        tensor_parallel: processes that compute every layer together, each with a part of the text: this one on
            ``device``, the others on the GPUs after it (all on the CPU where there is none).
        seed: of made-up weights.
        allow: what is refused otherwise, by name: ``"pickle"`` (weights that can run any code when they are read),
            ``"remote-code"`` (a model's own Python files).
        progress: show how far it is. None: in a notebook and on a terminal, where there is enough to load; True:
            always; False: never.

    Raises:
        LoadError: the source is unknown or cannot be loaded, or no policy fits; the message says what would help.
        OutOfMemoryError: the weights do not fit, told before they are read, with what would.
        PolicyError: the policy names a module that the model does not have.
    """
    auto, rounded = policy == "auto", _may_round(quantize, policy)
    policy = _starting(policy, MemoryPolicy(), budget)
    if policy.reclaim.expandable_segments:
        expand_segments()  # before anything is allocated; where it is too late the workbench says so
    # Importing this file has imported transformers: what the accelerator reads as its context holds the libraries.
    if device is not None and devices is not None:
        raise LabError("device= is for one device and devices= for several: give one of them")
    accelerators = open_devices(devices) if devices is not None else (open_accelerator(device),)
    accelerator = accelerators[0]
    if len(accelerators) > 1 and (auto or tensor_parallel > 1):
        one = "policy='auto'" if auto else "tensor_parallel="
        raise LabError(f"{one} and devices= do not go together: leave one of them out")
    asked: dict[str, Any] = {"source": source, "weights": weights, "dtype": dtype, "seed": seed, "allow": allow}
    resolved = resolve(**asked, device=accelerator.device, progress=visible(progress))
    share = None if tensor_parallel == 1 else take_share(resolved, tensor_parallel, 0)
    policy = _quantised(policy, quantize, resolved.model)
    choice = _chosen_for(resolved, policy, workload or Workload(), accelerator, rounded=rounded) if auto else None
    policy = policy if choice is None else choice.policy
    keep_in(resolved, policy.precisions())
    device_map = devices if isinstance(devices, Mapping) else None
    spread = spread_over(resolved, accelerators, policy, workload, device_map)
    ranks = None if share is None else start_ranks(resolved, share, policy, accelerator, asked)
    try:
        workbench = Workbench(resolved, policy, *accelerators, spread=spread, ranks=ranks, progress=progress)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
    if choice is not None:
        workbench.engine.state.event("policy", "chosen", why=choice.why.replace("\n", " "))
    return workbench


def attach(model: PreTrainedModel, processor: Any = None, *, policy: MemoryPolicy | None = None) -> Workbench:
    """Put the same controls on a transformers model that this process already holds.

    The weights move into memory of our own, module by module; the parameter objects stay the same.
    `Workbench.detach` gives the model back as it was.

    Args:
        model: any decoder model of transformers', with or without encoders before it; docs/models.md lists what was
            tried.
        processor: its processor or tokenizer; None: nothing can be asked, but memory is shown and moved.

    Raises:
        LoadError: the model has parameters without values, is spread over several devices, or gives no logits.
        PolicyError: the policy asks for another precision of the weights: that needs `load`.
    """
    accelerator = open_accelerator(model.device)
    adopted, policy = adopt(model, processor, device=model.device), policy or MemoryPolicy()
    keep_in(adopted, policy.precisions())
    return Workbench(adopted, policy, accelerator)


def connect(url: str, *, api_key: str | None = None, model: str | None = None, timeout: float = 120) -> RemoteWorkbench:
    """Work with a model behind an OpenAI-compatible endpoint as if it were in this process.

    Behind `autoglm-lab serve` every switch works. vLLM, SGLang, llama.cpp and transformers serve are recognised: they
    are asked for what they take, and what their metrics do not tell shows as not available.

    Args:
        url: such as ``http://127.0.0.1:8000/v1``.
        api_key: None: the endpoint asks for none. The admin key of a server of ours, to change its memory.
        model: None: the first that it lists.
        timeout: seconds without a word after which an answer counts as broken off.

    Raises:
        EndpointError: there is no server, it refuses the key, it is not OpenAI-compatible, or has no such model.
    """
    return RemoteWorkbench(url, api_key=api_key, model=model, timeout=timeout)


def plan(
    model: str | Path | PreTrainedConfig | Workbench,
    policy: MemoryPolicy | Literal["auto"] | None = None,
    *,
    budget: int | str | None = None,
    device: str | None = None,
    context: int = 8192,
    new_tokens: int = 256,
    images: int = 0,
    image_size: tuple[int, int] = (1080, 2400),
    audio_seconds: float = 0.0,
    conversations: int = 1,
    quantize: str | Mapping[str, str] | None = None,
    finetune: Literal["lora", "full"] | None = None,
    tokens: int | None = None,
    rank: int = 16,
) -> Plan:
    """Whether a model fits, before anything is loaded: the predicted peak of every phase, and what would make it fit.

    Args:
        model: what `load` takes, or an open workbench, whose device and measured constants are used then.
        policy: every setting; None: the workbench's, or the defaults; ``"auto"``: the best that fits, beginning from
            those; the plan's ``policy`` is the one that was chosen, and ``why`` says why.
        budget: bytes that the process may use, ``"24GiB"`` too; None: the policy's, else all that is free now.
        device: a card by name (``"RTX 4090"``), ``"cuda"``, ``"cpu"``; None: this machine's GPU, else a GPU of the
            budget's size where there is a budget, else the CPU.
        context: tokens of the prompt, those of its images and sounds included.
        new_tokens: most tokens of the answer.
        images: in the prompt, each of ``image_size`` (width, height) in pixels.
        audio_seconds: length of one sound in the prompt.
        conversations: kept at the same time, each as long.
        quantize: precision of the weights, as `load` takes it.
        finetune: plan one step of fine-tuning instead of an answer: ``lora``: adapters on every linear layer of the
            decoder; ``full``: all weights of the text. The rest stands in ``policy.training``.
        tokens: of the longest dialogue to learn; None: ``context``.
        rank: of the adapters.

    Raises:
        LoadError: the model is unknown.
        LabError: the device is unknown, or a figure cannot be.

    Example:
        >>> plan("autoglm-phone-9b", budget="24GiB", context=2048).verdict
        'fits'
    """
    from autoglm_lab.figures.waterfall import waterfall

    rounded = _may_round(quantize, policy)
    try:
        load = None if finetune is None else TrainingLoad(finetune, context if tokens is None else tokens, rank)
        workload = Workload(context, new_tokens, images, image_size, audio_seconds, conversations, load)
    except ValueError as error:
        raise LabError(str(error)) from None
    opened = model if isinstance(model, Workbench) else None
    chosen = _starting(policy, MemoryPolicy() if opened is None else opened.policy, budget)
    if opened is not None and device is None:
        where = opened.plan_device(chosen.budget)
    else:
        where = plan_device(device, chosen.budget, None)
    shapes = outline(model, device=where.kind) if not isinstance(model, Workbench) else model.outline()
    chosen = _quantised(chosen, quantize, shapes.model)
    check_modules(chosen, [spec.name for spec in anatomy(shapes.model)])
    shapes = outline_in(shapes, chosen.precisions())
    predict = planner(shapes, where)
    if load is not None and policy == "auto":
        raise LabError("policy='auto' is chosen for answers: give finetune= a MemoryPolicy, whose training is 'auto'")
    if policy != "auto":
        return replace(predict.plan(chosen, workload), drawer=waterfall)
    if chosen.budget is None and opened is None and where.name == device:
        chosen = chosen.replace(budget=where.total)  # the policy is for that card, wherever it is used
    return replace(choose(predict, chosen, workload, rounded=rounded).plan, drawer=waterfall)


def _starting(policy: MemoryPolicy | str | None, default: MemoryPolicy, budget: int | str | None) -> MemoryPolicy:
    if isinstance(policy, str) and policy != "auto":
        raise PolicyError(f"a policy is a MemoryPolicy or 'auto', not {policy!r}: MemoryPolicy.from_yaml reads one")
    given = policy if isinstance(policy, MemoryPolicy) else default
    return given if budget is None else given.replace(budget=budget)


def _may_round(quantize: str | Mapping[str, str] | None, policy: MemoryPolicy | str | None) -> bool:
    if quantize == "auto" and policy != "auto":
        raise PolicyError("quantize='auto' is chosen together with the other settings: pass policy='auto' too")
    return quantize == "auto"


def _quantised(policy: MemoryPolicy, quantize: str | Mapping[str, str] | None, model: PreTrainedModel) -> MemoryPolicy:
    precisions = spelled_out(None if quantize == "auto" else quantize, [spec.name for spec in anatomy(model)])
    return policy.replace(modules={name: {"precision": one} for name, one in precisions.items()})


def _chosen_for(
    resolved: Resolved, policy: MemoryPolicy, workload: Workload, accelerator: Any, *, rounded: bool
) -> Choice:
    shapes = Outline(
        resolved.name, skeleton(resolved.config, resolved.dtype), resolved.dtype, lambda: resolved.processor
    )
    shapes = outline_in(shapes, policy.precisions())
    where = plan_device(None, policy.budget, accelerator)
    choice = choose(planner(shapes, where), policy, workload, rounded=rounded)
    if not choice.fits:
        raise LoadError(f"{resolved.name}, {workload}: {choice.why}")
    return choice
