"""The processor of AutoGLM-Phone-9B's family without torchvision: a saved one, or a made-up one.

transformers builds the family's whole processor with its video part, which needs torchvision. `saved_processor` builds
it from the files of a folder without that part. `phone_processor` makes one from a configuration alone, so that one can
chat with made-up weights and count true tokens.

Images go through transformers' own processor of the family, and the prompt through its own `Glm4vProcessor`: an image
takes as many tokens as with the public model. The tokenizer is made here: every byte is a token, and so is every other
id, as a character of its own; what made-up weights generate is therefore text that reads back as the same ids. A text
takes more tokens than with the public tokenizer, which merges characters.
"""

from __future__ import annotations

import importlib.util
import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.processing_utils import ProcessorMixin

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NOTE = "the processor is made up: images take the public model's tokens, a text takes one token a byte"

# The family's markers that its configuration does not number; they get the ids before those that it does.
_MARKERS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_NUMBERED = {
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
}
# Nothing stands behind a message but the next one: the rendering of a dialogue begins the rendering of more.
_TEMPLATE = """[gMASK]<sop>
{%- for message in messages -%}
<|{{ message.role }}|>{{ '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|begin_of_image|><|image|><|end_of_image|>
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{ '\\n' }}
{%- if enable_thinking -%}<think>{%- endif -%}
{%- endif -%}"""


class PhoneProcessor(Glm4vProcessor):
    """The family's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image|>", "<|video|>"
        names = ("image_token_id", "video_token_id", "video_start_id", "video_end_id")
        markers = (self.image_token, self.video_token, "<|begin_of_video|>", "<|end_of_video|>")
        for name, marker in zip(names, markers, strict=True):
            setattr(self, name, tokenizer.convert_tokens_to_ids(marker))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def create_mm_token_type_ids(self, input_ids: Any) -> list[list[int]]:
        """1 for an image's tokens, 0 for text, ``[batch, seq]``."""
        return [[int(token == self.image_token_id) for token in map(int, row)] for row in input_ids]


def saved_processor(folder: Path) -> PhoneProcessor | None:
    """The processor that a folder of the family holds, its images read by PIL.

    Returns:
        None where the folder is of another family, or where torchvision is here and transformers can build it whole.

    Raises:
        OSError, ValueError: a file is missing or broken, as transformers says it.
    """
    if importlib.util.find_spec("torchvision") is not None or not _is_glm4v(folder):
        return None
    images = Glm4vImageProcessorPil.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return PhoneProcessor(images, tokenizer, _saved_template(folder) or tokenizer.chat_template)


def _is_glm4v(folder: Path) -> bool:
    named = set()
    for name in ("processor_config.json", "preprocessor_config.json"):
        settings = _settings(folder / name)
        named |= {str(settings.get("processor_class")), str(settings.get("image_processor_type"))}
    return any(name.startswith("Glm4v") for name in named)


def _saved_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _settings(folder / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def phone_processor(config: PreTrainedConfig) -> PhoneProcessor:
    """A processor for a Glm4v configuration, from nothing but that configuration.

    The longest edge is the family's default; ``processor.image_processor.size`` changes how many tokens an image takes.
    """
    vision: Any = config.vision_config
    sizes: dict[str, Any] = {name: getattr(vision, name) for name in ("patch_size", "temporal_patch_size")}
    sizes["merge_size"] = vision.spatial_merge_size
    images = Glm4vImageProcessorPil(**sizes)
    return PhoneProcessor(images, phone_tokenizer(config), _TEMPLATE)


def phone_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """A tokenizer of as many ids as the configuration states, its markers at the configuration's ids."""
    markers = _marker_ids(config)
    size = config.get_text_config().vocab_size
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | markers
    characters = map(chr, chain(range(0x100, 0xD800), range(0xE000, 0xFFF0), range(0x10000, 0x110000)))
    taken = set(vocabulary.values())
    vocabulary |= {next(characters): token for token in range(size) if token not in taken}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    # The tags switch between thought and answer, as in the public tokenizer; people never see them.
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False, special=True) for marker in markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=config.get_text_config().max_position_embeddings,
    )


def _marker_ids(config: PreTrainedConfig) -> dict[str, int]:
    numbered = {marker: int(getattr(config, name)) for name, marker in _NUMBERED.items()}
    first, last = min(numbered.values()) - len(_MARKERS), max(numbered.values()) + 1
    before = {marker: first + index for index, marker in enumerate(_MARKERS)}
    return before | numbered | {tag: last + index for index, tag in enumerate(_TAGS)}
