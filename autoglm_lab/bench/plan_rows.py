"""The settings that plans are held to, one a row; each is measured in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.policy import MemoryPolicy

PHONE, ARTICLE, QWEN, GEMMA = "autoglm-phone-9b", "autoglm-article", "qwen2.5-vl-3b", "gemma-3-4b"
_SHOT = (644, 1484)
"""An image of this size takes 1,219 tokens of the phone model."""
RANK = 16
"""Of the adapters that rows of training learn."""


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        name: what differs, for people; it begins with the model.
        settings: of the policy.
        dtype: of the weights; ``auto`` as `load` has it.
        force: try it also where the plan says that it cannot fit.
        auto: the policy is chosen for ``settings["budget"]``.
        train: a step of fine-tuning with adapters on a dialogue of ``context`` tokens, instead of an answer.
        expected: whether it has to be gone through (True), to run out of memory (False), or to be measured (None).
    """

    name: str
    model: str
    context: int
    new_tokens: int = 16
    images: int = 0
    image_size: tuple[int, int] = (1080, 2400)
    conversations: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    small: bool = False
    force: bool = False
    auto: bool = False
    train: bool = False
    expected: bool | None = None

    @property
    def policy(self) -> MemoryPolicy:
        """The policy of the row: nothing is given back on the way, and nothing chosen by chance."""
        return MemoryPolicy(**self.settings).replace(
            reclaim={"every_answers": None, "cached_share": None},
            generation={"eos": False, "max_new_tokens": self.new_tokens},
        )

    @property
    def workload(self) -> Workload:
        work = Workload(self.context, self.new_tokens, self.images, self.image_size, conversations=self.conversations)
        return replace(work, training=TrainingLoad("lora", self.context, RANK)) if self.train else work

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Setting:
        return cls(**{**data, "image_size": tuple(data["image_size"])})


def accuracy() -> tuple[Setting, ...]:
    """Rows whose peaks are compared with their plans."""
    return (*_phone(), *_article(), *_family(QWEN), *_qwen(), *_gemma(), *_training())


def small() -> tuple[Setting, ...]:
    """A few rows for a machine without a GPU, on the embedded model and narrow families."""
    tiny = "autoglm-tiny"
    return (
        Setting("tiny, 512 tokens", tiny, 512, 4),
        Setting("tiny, an image, vision on demand", tiny, 256, 4, 1, settings={"modules": {"vision": "on-demand"}}),
        Setting("qwen, narrow, an image", QWEN, 512, 4, 1, (112, 112), small=True),
        Setting("gemma, narrow, an image", GEMMA, 256, 4, 1, (112, 112), small=True),
        Setting("tiny, train on 128 tokens", tiny, 128, settings=_learning("every-layer"), train=True),
        Setting("tiny, a budget that is too small", tiny, 3000, 4, settings={"budget": "1MiB"}, expected=False),
    )


def _phone() -> Iterator[Setting]:
    for tokens in (512, 2048, 8192, 16_384):
        yield Setting(f"phone, {tokens:,} tokens", PHONE, tokens)
    yield Setting("phone, 4,096 tokens, float16", PHONE, 4096, dtype="float16")
    for chunk in (512, 4096):
        yield Setting(f"phone, 8,192 tokens, chunks of {chunk:,}", PHONE, 8192, settings={"kv": {"chunk": chunk}})
    for precision in ("int8", "int4"):
        kv = {"kv": {"precision": precision}}
        yield Setting(f"phone, 16,384 tokens, KV in {precision}", PHONE, 16_384, settings=kv)
    window = {"kv": {"max_tokens": 4096, "overflow": "window"}}
    yield Setting("phone, 8,192 tokens in a window of 4,096", PHONE, 8192, settings=window)
    yield Setting("phone, 8,192 tokens, KV on the host", PHONE, 8192, settings={"kv": {"place": "host"}})
    yield Setting("phone, 4,096 tokens, no graphs", PHONE, 4096, settings={"kv": {"graphs": False}})
    yield Setting("phone, 4,096 tokens, vision off", PHONE, 4096, settings={"modules": {"vision": "off"}})
    yield Setting("phone, 2,048 tokens, 4 conversations", PHONE, 2048, conversations=4)
    yield Setting("phone, an image of 336 x 336", PHONE, 1024, images=1, image_size=(336, 336))
    yield Setting("phone, an image of 532 x 1,176", PHONE, 2048, images=1, image_size=(532, 1176))
    yield Setting("phone, a screenshot", PHONE, 8192, images=1)
    yield Setting("phone, 3 screenshots at 1,219 tokens", PHONE, 8192, images=3, image_size=_SHOT)
    demand = {"modules": {"vision": "on-demand"}}
    yield Setting("phone, a screenshot, vision on demand", PHONE, 4096, images=1, image_size=_SHOT, settings=demand)


def _article() -> Iterator[Setting]:
    for tokens in (512, 8192):
        yield Setting(f"article, {tokens:,} tokens", ARTICLE, tokens)
    for images in (1, 3):
        yield Setting(f"article, {images} image(s)", ARTICLE, 2048, images=images)
    demand = {"modules": {"vision": "on-demand", "audio": "off"}}
    yield Setting("article, an image, vision on demand, audio off", ARTICLE, 2048, images=1, settings=demand)
    yield Setting("article, 1,024 tokens, 8 conversations", ARTICLE, 1024, conversations=8)


def _family(model: str) -> Iterator[Setting]:
    name = model.split("-", maxsplit=1)[0]
    for tokens in (512, 8192):
        yield Setting(f"{name}, {tokens:,} tokens", model, tokens)


def _qwen() -> Iterator[Setting]:
    yield Setting("qwen2.5, 16,384 tokens, chunks of 512", QWEN, 16_384, settings={"kv": {"chunk": 512}})
    yield Setting("qwen2.5, 16,384 tokens, KV in int8", QWEN, 16_384, settings={"kv": {"precision": "int8"}})
    yield Setting("qwen2.5, an image of 336 x 336", QWEN, 1024, images=1, image_size=(336, 336))
    yield Setting("qwen2.5, a screenshot", QWEN, 8192, images=1)
    yield Setting("qwen2.5, 3 screenshots of 644 x 1,484", QWEN, 8192, images=3, image_size=_SHOT)
    demand = {"modules": {"vision": "on-demand"}}
    yield Setting("qwen2.5, a screenshot, vision on demand", QWEN, 8192, images=1, settings=demand)
    yield Setting("qwen2.5, 2,048 tokens, 4 conversations", QWEN, 2048, conversations=4)


def _gemma() -> Iterator[Setting]:
    for tokens in (512, 4096, 8192):
        yield Setting(f"gemma, {tokens:,} tokens", GEMMA, tokens)
    yield Setting("gemma, an image", GEMMA, 1024, images=1)
    yield Setting("gemma, 3 images", GEMMA, 4096, images=3)


def _learning(checkpointing: str, **settings: Any) -> dict[str, Any]:
    return {"training": {"checkpointing": checkpointing, "micro_batch": 1, "accumulation": 1, **settings}}


def _training() -> Iterator[Setting]:
    for checkpointing, words in (("none", "nothing"), ("every-k", "every other layer"), ("every-layer", "every layer")):
        name = f"phone, train on 2,048 tokens, {words} computed again"
        yield Setting(name, PHONE, 2048, settings=_learning(checkpointing), train=True)
    four = {**_learning("every-layer", micro_batch=4), "modules": {"vision": "off"}}
    name = "phone, train on 4 x 1,024 tokens, every layer computed again"
    yield Setting(name, PHONE, 1024, settings=four, train=True)
    offload = _learning("none", offload=0.5)
    yield Setting("phone, train on 2,048 tokens, half offloaded", PHONE, 2048, settings=offload, train=True)
    for checkpointing, words in (("none", "nothing"), ("every-layer", "every layer")):
        name = f"article, train on 1,024 tokens, {words} computed again"
        yield Setting(name, ARTICLE, 1024, settings=_learning(checkpointing), train=True)
