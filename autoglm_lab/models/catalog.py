"""The models that have a name here, and what was claimed about them.

Configurations are built when asked for: importing this file loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoglm_lab.errors import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TINY_VOCAB_SIZE = 1536
"""Entries of the embedded tokenizer, recipes/tiny/tokenizer.py."""

TINY_FOLDER = Path(__file__).parent / "weights" / "autoglm-tiny"


@dataclass(frozen=True, slots=True)
class Claim:
    """A figure that somebody published, never a fact: show it beside what is computed and measured.

    Attributes:
        subject: A module (`text`, `vision`, `audio`), `kv` or `total`.
        nbytes: The claim in bytes (decimal gigabytes as published).
        condition: Under what it was stated.
    """

    subject: str
    nbytes: int
    condition: str


@dataclass(frozen=True, slots=True)
class Preset:
    """A model by name.

    Attributes:
        name: What `load` takes.
        title: One line about it.
        build: Makes its configuration.
        folder: Its weights and processor inside the package, None where it has none.
        repo_id: Its public repository, None where it has none.
        processor_folder: Where to take a tokenizer from when the model has no processor of its own.
        made_up_processor: Makes one from the configuration, for where the public one is not; and what to say of it.
        claims: What was published about its memory.
    """

    name: str
    title: str
    build: Callable[[], PreTrainedConfig]
    folder: Path | None = None
    repo_id: str | None = None
    processor_folder: Path | None = None
    made_up_processor: Callable[[PreTrainedConfig], tuple[Any, tuple[str, ...]]] | None = None
    claims: tuple[Claim, ...] = ()

    def config(self) -> PreTrainedConfig:
        """A new configuration, with its Auto classes registered."""
        return self.build()

    def processor(self) -> Any:
        """The processor for this preset, from files inside the package.

        Raises:
            LoadError: It has none there, or they are missing.
        """
        folder = self.folder or self.processor_folder
        if folder is None:
            raise LoadError(f"{self.name} has no processor inside the package: load it from {self.repo_id}")
        if not (folder / "tokenizer.json").is_file():
            raise LoadError(f"{folder} has no tokenizer.json: the package was installed without its weights folder")
        from autoglm_lab.models.autoglm import AutoGlmProcessor

        config: Any = self.config()
        return AutoGlmProcessor.from_pretrained(
            folder,
            image_seq_length=config.image_seq_length,
            audio_lookahead_tokens=config.audio_config.default_num_lookahead_tokens,
        )


def names() -> tuple[str, ...]:
    """The names that `preset` knows."""
    return tuple(_PRESETS)


def presets() -> tuple[Preset, ...]:
    """All presets."""
    return tuple(_PRESETS.values())


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        LoadError: There is none; the message lists the names.
    """
    try:
        return _PRESETS[name]
    except KeyError:
        raise LoadError(f"there is no preset {name!r}; presets: {', '.join(_PRESETS)}") from None


def _tiny() -> PreTrainedConfig:
    from autoglm_lab.models.autoglm import AutoGlmConfig

    return AutoGlmConfig(
        dtype="bfloat16",
        vision_merge=2,
        tie_word_embeddings=True,
        vision_config={"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
        audio_config={
            **_conformer(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256),
            "subsampling_conv_channels": 32,
        },
        text_config={
            "vocab_size": TINY_VOCAB_SIZE,
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 512,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        },
    )


def _article() -> PreTrainedConfig:
    """Stated: ViT-Tiny at 224 x 224 with 512-wide features, Conformer-Small at 16 kHz, GLM of 12 layers x 4096.

    What it does not state follows the names: ViT-Tiny (DeiT), Conformer-S (Gulati et al. 2020, sizes as in NeMo), and
    the public GLM-4-9B for heads, feed-forward and vocabulary.
    """
    from autoglm_lab.models.autoglm import AutoGlmConfig

    return AutoGlmConfig(
        dtype="bfloat16",
        vision_config={"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768},
        audio_config={
            **_conformer(hidden_size=176, num_hidden_layers=16, num_attention_heads=4, intermediate_size=704),
            "subsampling_conv_channels": 176,
            "conv_kernel_size": 31,
        },
        text_config={
            "vocab_size": 151_552,
            "hidden_size": 4096,
            "num_hidden_layers": 12,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "intermediate_size": 13_696,
        },
    )


def _conformer(**sizes: int) -> dict[str, Any]:
    no_dropout = dict.fromkeys(("dropout", "layerdrop", "activation_dropout", "attention_dropout"), 0.0)
    return {**sizes, **no_dropout, "default_num_lookahead_tokens": 1}


def _phone() -> PreTrainedConfig:
    """The public config.json; the library's defaults lack mrope_section and then fail at the first forward."""
    from transformers import Glm4vConfig

    return Glm4vConfig(
        dtype="bfloat16",
        text_config={
            "vocab_size": 151_552,
            "hidden_size": 4096,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "intermediate_size": 13_696,
            "max_position_embeddings": 65_536,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [8, 12, 12],
            },
        },
        vision_config={
            "depth": 24,
            "hidden_size": 1536,
            "num_heads": 12,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "intermediate_size": 13_696,
            "out_hidden_size": 4096,
        },
    )


def _phone_processor(config: PreTrainedConfig) -> tuple[Any, tuple[str, ...]]:
    from autoglm_lab.models.phone_processor import NOTE, phone_processor

    return phone_processor(config), (NOTE,)


def _article_claims() -> tuple[Claim, ...]:
    stated = {"text": 6.8, "vision": 2.1, "audio": 1.7, "kv": 3.0, "total": 13.6}
    return tuple(Claim(subject, round(gigabytes * 1e9), "batch 1, length 512") for subject, gigabytes in stated.items())


_PRESETS: dict[str, Preset] = {
    entry.name: entry
    for entry in (
        Preset(
            "autoglm-tiny",
            "5.9 M parameters, trained on made-up phone screens and tones; inside the package",
            _tiny,
            folder=TINY_FOLDER,
        ),
        Preset(
            "autoglm-article",
            "the sizes that the article states; no weights exist, dummy weights only",
            _article,
            processor_folder=TINY_FOLDER,
            claims=_article_claims(),
        ),
        Preset(
            "autoglm-phone-9b",
            "the public vision-language phone agent, GLM-4.1V architecture",
            _phone,
            repo_id="zai-org/AutoGLM-Phone-9B",
            made_up_processor=_phone_processor,
        ),
    )
}
