"""`MemoryPolicy`: every setting a person can turn, in one validated value object.

A widget edits it, a YAML file holds it, the command line reads it, the engine obeys it. It never changes in place:
`replace` gives a new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from autoglm_lab.errors import PolicyError
from autoglm_lab.units import exact_bytes, parse_bytes


def _off(value: Any) -> Any:
    """YAML 1.1 reads a bare ``off`` as False."""
    return "off" if value is False else value


def _sparse(value: Any) -> Any:
    """YAML 1.1 reads a bare ``2:4`` as minutes and seconds."""
    return "2:4" if type(value) is int and value == 124 else value


Residency = Annotated[Literal["keep", "on-demand", "off"], BeforeValidator(_off)]
WeightPrecision = Annotated[
    Literal["model", "float32", "bfloat16", "float16", "int8", "int4", "nf4", "2:4"], BeforeValidator(_sparse)
]
Overflow = Literal["stop", "drop-oldest-turns", "window", "evict", "refuse"]
Bytes = Annotated[int, BeforeValidator(parse_bytes), PlainSerializer(exact_bytes, when_used="json"), Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModulePolicy(_Part):
    """Where one module's weights may be, and how exactly they are kept.

    Attributes:
        residency: ``keep`` on the device; ``on-demand``: woken when a request needs it; ``off``: parked, and a request
            that needs it is refused. Default ``keep``.
        park_to: ``host`` (pinned memory), ``disk`` (memory-mapped safetensors) or ``auto``: host beside a GPU, disk
            where the device is the host. Default ``auto``.
        keep_alive: seconds that an on-demand module stays after its last use. Default 30.
        precision: of the weights: ``model``: as they are loaded; ``float32``, ``bfloat16``, ``float16``; ``int8`` and
            ``int4``: linear layers and embeddings in about a half and a quarter of bfloat16 (lossy); ``nf4``: as int4,
            and finer for a base beneath adapters that learn (QLoRA), but slower to answer with; ``2:4``: of every four
            numbers of the linear layers the two largest (lossy). It is set when the model is loaded. Default ``model``.
    """

    residency: Residency = "keep"
    park_to: Literal["auto", "host", "disk"] = "auto"
    keep_alive: float = Field(30.0, ge=0)
    precision: WeightPrecision = "model"


class KvPolicy(_Part):
    """How much of a conversation's keys and values may be kept, where, and how exactly.

    Attributes:
        max_tokens: most tokens of one conversation, prompt and answer together; None: the model's own limit.
        max_bytes: most bytes of one conversation's keys and values; the stricter of both limits counts.
        overflow: at the limit, ``stop`` ends the answer (finish reason ``length``), ``drop-oldest-turns`` forgets the
            oldest turns (never the system prompt nor the current turn) and prefills the rest anew at its new positions,
            ``window`` forgets the oldest tokens after the first ``sinks`` and goes on (lossy), ``evict`` those that got
            the least attention (lossy), ``refuse`` raises `ContextLimitError` before the prompt is read. Default
            ``stop``.
        sinks: first tokens that ``window`` and ``evict`` never forget. Default 64.
        observation: latest tokens whose attention decides what ``evict`` forgets. Default 32.
        precision: ``model``: as the model computes; ``int8`` and ``int4`` take about a half and a third (lossy).
        place: ``device``, or ``host``: pinned host memory, brought in layer by layer while the model runs (slower).
        chunk: most prompt tokens that one prefill step reads; a smaller chunk has a lower peak. Default 2048.
        graphs: decode through captured CUDA graphs where there is a GPU: faster, for some memory. Default True.
        reuse: keep the KV of a conversation between its turns. Default True.
        max_conversations: KV is kept for at most this many conversations, least recently used dropped first.
        prefix_bytes: bytes on the device for prefixes that no conversation holds any more. Default 256 MiB.
        prefix_host_bytes: bytes on the host for those that leave the device. Default 1 GiB; nothing on a CPU machine,
            where the device is the host.
        encoder_bytes: bytes on the device for outputs of the image and audio encoders. Default 128 MiB.
    """

    max_tokens: int | None = Field(None, ge=16)
    max_bytes: Bytes | None = None
    overflow: Overflow = "stop"
    sinks: int = Field(64, ge=0)
    observation: int = Field(32, ge=1, le=1024)
    precision: Literal["model", "int8", "int4"] = "model"
    place: Literal["device", "host"] = "device"
    chunk: int = Field(2048, ge=16)
    graphs: bool = True
    reuse: bool = True
    max_conversations: int = Field(8, ge=1)
    prefix_bytes: Bytes = 256 << 20
    prefix_host_bytes: Bytes = 1 << 30
    encoder_bytes: Bytes = 128 << 20

    @model_validator(mode="after")
    def _something_to_choose(self) -> Self:
        if self.overflow == "evict" and self.max_tokens is not None and self.max_tokens < self.sinks + 32:
            raise ValueError(
                f"overflow 'evict' has too few to choose from: {self.sinks} of {self.max_tokens} are sinks; raise "
                f"max_tokens to {self.sinks + 32}, or lower sinks"
            )
        return self


class ReclaimPolicy(_Part):
    """When memory that is cached but unused goes back to the system.

    Attributes:
        every_answers: after this many answers; None: never by count. Default 10, the article's.
        cached_share: when the allocator's unused cache passes this share of the device, 0 to 1; None: never by share.
        traceback: also clear what Jupyter keeps alive through the last traceback. Default False.
        expandable_segments: let CUDA's allocator grow its segments, which fragments less. It counts only when it is set
            before torch has memory on the GPU. Default False.
    """

    every_answers: int | None = Field(10, ge=1)
    cached_share: float | None = Field(0.2, gt=0, le=1)
    traceback: bool = False
    expandable_segments: bool = False


class GenerationPolicy(_Part):
    """How an answer is sampled, in transformers' own terms. ``temperature`` 0 is greedy.

    Attributes:
        frequency_penalty: taken off a token's logit each time that the answer has it already. Default 0.
        presence_penalty: taken off once where the answer has it at all. Default 0.
        stop: at most 4 texts that end the answer where one of them begins; the text itself is left out.
    """

    max_new_tokens: int = Field(256, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field((), max_length=4)
    eos: bool = True
    thinking: bool = False
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)

    @model_validator(mode="after")
    def _minimum_below_maximum(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        return self


class TrainingPolicy(_Part):
    """How fine-tuning spends memory. What it computes stays the same, but for ``adamw-8bit``.

    Attributes:
        checkpointing: layers that keep their input alone and are computed again in the backward pass: ``none``,
            ``every-k`` (each ``every``-th), ``every-layer``, or ``auto`` (default): as many as the budget needs.
        every: of ``every-k``. Default 2.
        offload: share, 0 to 1, of what the layers keep that waits in pinned host memory: of the layers that are not
            computed again, else of the inputs. Default 0.
        loss_chunk: most tokens whose logits exist at the same time. Default 256.
        optimizer: ``adamw``, or ``adamw-8bit``: its states in 8 bits (torchao). Default ``adamw``.
        micro_batch: dialogues that go through the model together. Default 4.
        accumulation: micro-batches a step; their product is the batch that a step learns from. Default 4.
        cache_features: run frozen encoders once for all of the data and park them. Default True.
    """

    checkpointing: Literal["none", "every-k", "every-layer", "auto"] = "auto"
    every: int = Field(2, ge=1)
    offload: float = Field(0.0, ge=0, le=1)
    loss_chunk: int = Field(256, ge=16)
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    micro_batch: int = Field(4, ge=1)
    accumulation: int = Field(4, ge=1)
    cache_features: bool = True


class HistoryPolicy(_Part):
    """What an endpoint is told again of earlier turns. An engine in this process keeps them and is told nothing again.

    Attributes:
        media: ``resend`` the images and sounds of earlier turns with every turn, or ``strip`` them to their text, as
            phone agents do: shorter prompts, of which a server finds less in its cache. Default ``resend``.
    """

    media: Literal["resend", "strip"] = "resend"


class PlacementPolicy(_Part):
    """What of the model is kept elsewhere than on the device. It counts when a model is loaded.

    Attributes:
        host_bytes: by how much the text shall take less of the GPU. Its embedding, then as many bytes of its layers
            as it takes, stay in pinned host memory; the layers' come for each use, one part ahead of the one that
            computes: exact, and slow, since they pass the bus for every token. Default 0. Without a GPU it is left
            alone: the device is the host.
    """

    host_bytes: Bytes = 0


class MemoryPolicy(_Part):
    """Every setting of the workbench, in one value.

    Attributes:
        modules: by module name; a module that is not named is kept. A bare residency is accepted:
            ``{"vision": "on-demand"}``.
        kv: limits of the KV cache.
        reclaim: when unused memory is given back.
        generation: sampling of answers.
        history: what an endpoint is told again.
        training: memory of fine-tuning.
        placement: what is kept elsewhere than on the device.
        budget: bytes the process may use on the device, its context included; an int or text such as ``"24GiB"``;
            None: the whole device.
        pinned: most bytes of page-locked host memory for parked modules; what is beyond is pageable; None: half of the
            host's memory.
        max_image_tokens: most tokens of one image, at least 16: larger images are made smaller before they are
            encoded, which costs detail; None: as the model's processor has it. A model of one image size leaves it
            alone and says so.

    Example:
        >>> MemoryPolicy(modules={"audio": "off"}, budget="24GiB").budget
        25769803776
    """

    modules: dict[str, ModulePolicy] = Field(default_factory=dict)
    kv: KvPolicy = KvPolicy()
    reclaim: ReclaimPolicy = ReclaimPolicy()
    generation: GenerationPolicy = GenerationPolicy()
    history: HistoryPolicy = HistoryPolicy()
    training: TrainingPolicy = TrainingPolicy()
    placement: PlacementPolicy = PlacementPolicy()
    budget: Bytes | None = None
    pinned: Bytes | None = None
    max_image_tokens: int | None = Field(None, ge=16)

    def __init__(self, **settings: Any) -> None:
        """Validate ``settings``.

        Raises:
            PolicyError: a setting does not exist or its value cannot be; the message names the valid ones.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise PolicyError(_explain(error)) from None

    @field_validator("modules", mode="before")
    @classmethod
    def _bare_residency(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: _residency_or_part(part) for name, part in value.items()}

    def module(self, name: str) -> ModulePolicy:
        """The settings of one module; the defaults where the policy does not name it.

        ``text@1``, the part of a module on a second device, has those of ``text`` where it is not named itself.
        """
        whole = self.modules.get(name.partition("@")[0], ModulePolicy())
        return self.modules.get(name, whole)

    def precisions(self) -> dict[str, str]:
        """The precision of every module that is not kept as it is loaded."""
        return {name: part.precision for name, part in self.modules.items() if part.precision != "model"}

    def replace(self, **changes: Any) -> MemoryPolicy:
        """A new policy with ``changes`` merged in, part by part.

        Raises:
            PolicyError: as the constructor.
        """
        return MemoryPolicy(**_merge(self.model_dump(), changes))

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults: short to read, and complete."""
        settings: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        return settings

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True) if self.to_dict() else "{}\n"

    def to_python(self) -> str:
        """The statement that sets this policy on a workbench named ``wb``."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"wb.policy = lab.MemoryPolicy({arguments})"

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> MemoryPolicy:
        if not isinstance(settings, Mapping):
            raise PolicyError(f"a policy is a mapping of settings, not {type(settings).__name__}; {_valid(cls)}")
        return cls(**settings)

    @classmethod
    def from_json(cls, text: str) -> MemoryPolicy:
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise PolicyError(f"the policy is not JSON: {error}") from None

    @classmethod
    def from_yaml(cls, source: str | Path) -> MemoryPolicy:
        """From YAML text, or from a file when ``source`` is a `Path`."""
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PolicyError(f"the policy is not YAML: {error}") from None
        return cls.from_dict({} if settings is None else settings)


def _residency_or_part(value: Any) -> Any:
    return {"residency": value} if isinstance(value, str | bool) else value


def _merge(old: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in changes.items():
        if isinstance(value, BaseModel):
            value = value.model_dump()
        if name == "modules" and isinstance(value, Mapping):
            value = {key: _residency_or_part(part) for key, part in value.items()}
        before = merged.get(name)
        merged[name] = _merge(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return merged


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_one(dict(problem)) for problem in error.errors())


def _explain_one(problem: dict[str, Any]) -> str:
    path = [str(step) for step in problem["loc"]]
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"there is no setting '{where}'; {_valid(_part_at(path[:-1]))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where or 'policy'}: {message} (got {problem['input']!r})"


def _part_at(path: list[str]) -> type[BaseModel]:
    parts: dict[str, type[BaseModel]] = {
        "kv": KvPolicy,
        "reclaim": ReclaimPolicy,
        "generation": GenerationPolicy,
        "history": HistoryPolicy,
        "training": TrainingPolicy,
        "placement": PlacementPolicy,
        "modules": ModulePolicy,
    }
    return parts[path[0]] if path else MemoryPolicy


def _valid(part: type[BaseModel]) -> str:
    return f"valid settings are {', '.join(part.model_fields)}"
