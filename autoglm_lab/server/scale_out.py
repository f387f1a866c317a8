"""The same policy for an engine of another project: the command of ``vllm serve``, and what to deploy it with.

vLLM answers many more people at once than the engine of this package; it knows neither modules that come and go nor
where each byte is. docs/scale_out.md says when to change over.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from autoglm_lab.errors import LabError
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.catalog import presets
from autoglm_lab.models.image_tokens import image_edges
from autoglm_lab.models.loading import Outline
from autoglm_lab.policy import GenerationPolicy, MemoryPolicy
from autoglm_lab.units import GiB

_SAMPLING: Final = {
    "max_new_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
}
_FLOATS: Final = ("float32", "bfloat16", "float16")
_QUANTIZED: Final = {"int8": "fp8"}
"""Precisions of the text that vLLM has something near to while it loads a checkpoint that is not quantised."""


@dataclass(frozen=True)
class ModelFacts:
    """What a command needs to know of a model.

    Attributes:
        source: what vLLM loads: a hub id or a folder.
        context: most tokens that the model takes; None: unknown.
        modalities: ``text``, ``image``, ``audio``.
        token_bytes: of one token's keys and values as the model computes them; None: they are not all kept.
        dtype: such as ``bfloat16``.
        image_edges: makes the bounds of an image in pixels from the most tokens that it may take, as the image
            processor has them; None: it has none, or takes no images.
    """

    source: str
    context: int | None
    modalities: tuple[str, ...]
    token_bytes: float | None
    dtype: str
    image_edges: Callable[[int], dict[str, int]] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, outline: Outline, source: str) -> ModelFacts:
        """From a model without its weights, and what was asked for.

        Raises:
            LabError: its architecture is this package's own, which vLLM does not have.
        """
        kind = outline.model.config.model_type
        if kind.startswith("autoglm"):
            raise LabError(f"vLLM does not know {source} ({kind}, this package's own): serve it with --engine local")
        preset = next((one for one in presets() if one.name == source), None)
        folder = None if preset is None or preset.folder is None else str(preset.folder)
        modules = {spec.name for spec in anatomy(outline.model)}
        config = outline.model.config
        form = PageFormat.of(config, outline.dtype)
        return cls(
            source=source if preset is None else folder or preset.repo_id or source,
            context=getattr(config.get_text_config(), "max_position_embeddings", None),
            modalities=("text", *("image",) * ("vision" in modules), *("audio",) * ("audio" in modules)),
            token_bytes=None if form is None else form.nbytes / PAGE_TOKENS,
            dtype=str(outline.dtype).removeprefix("torch."),
            image_edges=image_edges(outline.processor()) if "vision" in modules else None,
        )


@dataclass(frozen=True)
class Deployment:
    """How it is deployed.

    Attributes:
        name: that clients ask for.
        card: bytes of one GPU; None: unknown, and no share of it is said.
        images: most images of one request, each of ``image_size`` (width, height).
        running: most answers under way at the same time.
        tensor_parallel: GPUs that share one model; data_parallel: copies of it.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    card: int | None = None
    images: int = 4
    image_size: tuple[int, int] = (1080, 2400)
    running: int = 32
    tensor_parallel: int = 1
    data_parallel: int = 1


@dataclass(frozen=True)
class VllmCommand:
    """A command of vLLM.

    Attributes:
        source: what it loads.
        flags: by name without dashes; True: alone, False: with ``no-`` before it.
        notes: settings of the policy that vLLM has not, and what stands in for them; one sentence each.
    """

    source: str
    flags: dict[str, Any]
    notes: tuple[str, ...]

    def arguments(self) -> list[str]:
        """The command as a list, ``vllm`` first."""
        return ["vllm", "serve", self.source, *(word for flag in self._flags() for word in flag)]

    def __str__(self) -> str:
        """One line a flag, ready for a shell; the notes are comments before it."""
        lines = [f"vllm serve {shlex.quote(self.source)}", *(shlex.join(flag) for flag in self._flags())]
        return "\n".join([*(f"# {note}" for note in self.notes), " \\\n  ".join(lines)])

    def _flags(self) -> list[list[str]]:
        said = []
        for name, value in self.flags.items():
            if isinstance(value, bool):
                said.append([f"--{name}" if value else f"--no-{name}"])
            else:
                said.append([f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)])
        return said

    def ray_serve(self, copies: int = 1) -> str:
        """A configuration of Ray Serve: ``serve run FILE``."""
        engine = {name.replace("-", "_"): value for name, value in self.flags.items() if name not in _OF_ENDPOINT}
        config = {
            "model_loading_config": {"model_id": self.flags["served-model-name"], "model_source": self.source},
            "deployment_config": {"autoscaling_config": {"min_replicas": copies, "max_replicas": copies}},
            "engine_kwargs": engine,
        }
        application = {
            "name": "llm",
            "route_prefix": "/",
            "import_path": "ray.serve.llm:build_openai_app",
            "args": {"llm_configs": [config]},
        }
        return self._yaml({"applications": [application]})

    def kubernetes(self, image: str = "vllm/vllm-openai:latest", copies: int = 1) -> str:
        """A Deployment and a Service, with the labels that llm-d's gateway selects by."""
        name = "".join(one if one.isalnum() else "-" for one in str(self.flags["served-model-name"]).lower()).strip("-")
        labels = {"app": name, "llm-d.ai/inferenceServing": "true", "llm-d.ai/model": name}
        port = self.flags["port"]
        command = VllmCommand(self.source, self.flags | {"host": "0.0.0.0"}, ()).arguments()  # noqa: S104 - a pod's own
        gpus = str(self.flags.get("tensor-parallel-size", 1) * self.flags.get("data-parallel-size", 1))
        container = {
            "name": "vllm",
            "image": image,
            "command": command,
            "ports": [{"name": "http", "containerPort": port}],
            "env": [{"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": f"{name}-key", "key": "api-key"}}}],
            "resources": {"limits": {"nvidia.com/gpu": gpus}},
            "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "failureThreshold": 60},
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108 - shared memory of NCCL
        }
        pod = {"containers": [container], "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]}
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "replicas": copies,
                "selector": {"matchLabels": {"app": name}},
                "template": {"metadata": {"labels": dict(labels)}, "spec": pod},
            },
        }
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": dict(labels)},
            "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": port, "targetPort": "http"}]},
        }
        return self._yaml(deployment, service)

    def _yaml(self, *documents: dict[str, Any]) -> str:
        head = "".join(f"# {note}\n" for note in self.notes)
        return head + yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)


_OF_ENDPOINT = frozenset({"served-model-name", "host", "port"})


def vllm_command(policy: MemoryPolicy, facts: ModelFacts, deployment: Deployment) -> VllmCommand:
    """The command that comes nearest to a policy."""
    flags: dict[str, Any] = {
        "served-model-name": deployment.name,
        "host": deployment.host,
        "port": deployment.port,
        "dtype": facts.dtype,
    }
    context = _context(policy, facts)
    if context is not None:
        flags["max-model-len"] = context
    flags["max-num-seqs"] = deployment.running
    flags["max-num-batched-tokens"] = max(policy.kv.chunk, deployment.running)
    if len(facts.modalities) > 1:
        flags["limit-mm-per-prompt"] = _media(policy, facts, deployment)
    if policy.max_image_tokens is not None and facts.image_edges is not None:
        flags["mm-processor-kwargs"] = {"size": facts.image_edges(policy.max_image_tokens)}
    precision = policy.module("text").precision
    flags["dtype"] = precision if precision in _FLOATS else facts.dtype
    if precision in _QUANTIZED:
        flags["quantization"] = _QUANTIZED[precision]
    if policy.placement.host_bytes:
        flags["cpu-offload-gb"] = round(policy.placement.host_bytes / GiB, 3)
    flags["kv-cache-dtype"] = "auto" if policy.kv.precision == "model" else "fp8"
    if policy.kv.max_bytes is not None:
        flags["kv-cache-memory-bytes"] = policy.kv.max_bytes * policy.kv.max_conversations
    if policy.budget is not None and deployment.card is not None:
        flags["gpu-memory-utilization"] = round(min(policy.budget / deployment.card, 0.99), 3)
    flags["enable-prefix-caching"] = policy.kv.reuse
    flags["enable-prompt-tokens-details"] = True
    if not policy.kv.graphs:
        flags["enforce-eager"] = True
    for name, size in (("tensor", deployment.tensor_parallel), ("data", deployment.data_parallel)):
        if size > 1:
            flags[f"{name}-parallel-size"] = size
    plain, said = GenerationPolicy(), policy.generation
    changed = {at: getattr(said, name) for name, at in _SAMPLING.items() if getattr(said, name) != getattr(plain, name)}
    flags["override-generation-config"] = {"temperature": said.temperature} | changed
    return VllmCommand(facts.source, flags, tuple(_notes(policy, facts, deployment)))


def _context(policy: MemoryPolicy, facts: ModelFacts) -> int | None:
    limits = [limit for limit in (policy.kv.max_tokens, facts.context) if limit is not None]
    if policy.kv.max_bytes is not None and facts.token_bytes:
        limits.append(int(policy.kv.max_bytes / facts.token_bytes))
    return min(limits, default=None)


def _media(policy: MemoryPolicy, facts: ModelFacts, deployment: Deployment) -> dict[str, Any]:
    """What one request may bring. vLLM measures its memory with the largest, so what never comes is said to be none."""
    limits: dict[str, Any] = {}
    width, height = deployment.image_size
    if "image" in facts.modalities:
        off = policy.module("vision").residency == "off" or not deployment.images
        limits["image"] = 0 if off else {"count": deployment.images, "width": width, "height": height}
    if "audio" in facts.modalities:
        limits["audio"] = 0 if policy.module("audio").residency == "off" else 1
    return limits | {"video": 0}


def _notes(policy: MemoryPolicy, facts: ModelFacts, deployment: Deployment) -> list[str]:
    notes = []
    if policy.kv.precision != "model":
        notes.append(f"kv.precision {policy.kv.precision}: vLLM keeps keys and values in fp8 instead (lossy)")
    moving = [name for name, module in policy.modules.items() if module.residency == "on-demand"]
    if moving:
        notes.append(f"{', '.join(moving)} on demand: vLLM keeps every module on the device")
    if policy.kv.overflow in ("drop-oldest-turns", "window", "evict"):
        notes.append(f"kv.overflow {policy.kv.overflow}: vLLM ends the answer at the limit")
    if policy.kv.place == "host":
        notes.append("kv.place host: vLLM keeps keys and values on the device")
    notes += _notes_on_weights(policy)
    if policy.max_image_tokens is not None and facts.image_edges is None:
        notes.append("max_image_tokens: this model's processor has no bounds that vLLM could be told")
    if policy.budget is not None and deployment.card is None:
        notes.append(
            "budget: the size of the card is not known, so vLLM takes its default share; name it with --device"
        )
    if facts.token_bytes is None:
        notes.append("this model keeps not every token's keys and values: sizes of the cache are vLLM's")
    return notes


def _notes_on_weights(policy: MemoryPolicy) -> list[str]:
    notes = []
    for name, precision in policy.precisions().items():
        if name == "text" and precision in _FLOATS:
            continue
        if name == "text" and precision in _QUANTIZED:
            kept = _QUANTIZED[precision]
            notes.append(f"modules.text.precision {precision}: vLLM keeps the layers in {kept} instead (lossy)")
        else:
            notes.append(f"modules.{name}.precision {precision}: vLLM keeps these weights as they are loaded")
    if policy.placement.host_bytes:
        notes.append("placement.host_bytes: vLLM takes whole layers to the host, and waits for them")
    return notes
