"""The AutoGLM processor: messages, images and sounds in, tensors for the model out.

The library's processor bases are partly annotated, for the classes that it ships.
"""
# mypy: disable-error-code="arg-type, attr-defined, misc, no-any-return, no-untyped-call, override"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, BatchFeature, ViTImageProcessorPil
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import AddedToken

from .attachments import flat, read_audio, read_image
from .chat_format import (
    ANSWER_TAGS,
    AUDIO,
    BEGIN_ANSWER,
    BEGIN_THINK,
    CHAT_TEMPLATE,
    END,
    END_ANSWER,
    END_THINK,
    IMAGE,
    SPECIAL_TOKENS,
    Piece,
    blocks,
    guard,
    pieces,
    split_answer,
)
from .feature_extraction_autoglm import AutoGlmFeatureExtractor


def special_tokens() -> list[AddedToken]:
    """The markers as a tokenizer takes them, in the order of their ids.

    The four answer tags are not "special": `decode(skip_special_tokens=True)` keeps them, being the public format.
    """
    return [AddedToken(token, special=token not in ANSWER_TAGS, normalized=False) for token in SPECIAL_TOKENS]


class AutoGlmProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of the processor's parts."""

    _defaults = {"text_kwargs": {"padding": False, "padding_side": "left"}, "audio_kwargs": {"sampling_rate": 16_000}}


class AutoGlmProcessor(ProcessorMixin):
    """ViT image processor (PIL), streaming log-mel front-end and tokenizer in one.

    Args:
        image_processor: Makes pixel_values [n_images, 3, 224, 224].
        feature_extractor: Makes log-mels [n_audio, frames, mels] of 16 kHz mono sound.
        tokenizer: Has SPECIAL_TOKENS as its first ids.
        chat_template: Jinja; None for CHAT_TEMPLATE.
        image_seq_length: Tokens an image (`config.image_seq_length`).
        audio_lookahead_tokens: `config.audio_config.default_num_lookahead_tokens`: sounds are padded with silence to
            whole chunks of one token more, so that clip and live stream give the same tokens. None: as the feature
            extractor has it.
    """

    valid_processor_kwargs = AutoGlmProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_seq_length: int = 49,
        audio_lookahead_tokens: int | None = None,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.image_token, self.audio_token = IMAGE, AUDIO
        self.image_token_id, self.audio_token_id = (tokenizer.convert_tokens_to_ids(t) for t in (IMAGE, AUDIO))
        feature_extractor = AutoGlmFeatureExtractor.of(feature_extractor, audio_lookahead_tokens)
        self.audio_lookahead_tokens = feature_extractor.lookahead_tokens
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def num_audio_tokens(self, samples: int) -> int:
        """Tokens that a sound of `samples` samples takes in the prompt."""
        return self.feature_extractor.chunks.num_tokens(samples)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        audio_token_counts: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tensors for the model from rendered prompts and what their placeholders stand for.

        Args:
            images: PIL images, arrays or paths, in the order of the `<|image|>` of all prompts.
            text: Rendered prompts; markers in them are markers (apply_chat_template guards what people typed).
            audio: 16 kHz mono float arrays or paths, in the order of the `<|audio|>`.
            audio_token_counts: Instead of `audio`, the tokens of sounds that were encoded before (a live stream).
            **kwargs: `padding`, `padding_side`, `truncation`, `max_length`, `return_tensors` … as tokenizers have them.

        Returns:
            input_ids, attention_mask, block_sequence_ids [batch, seq]; pixel_values [n_images, 3, 224, 224];
            input_features [n_audio, frames, mels] and input_features_mask [n_audio, frames].

        Raises:
            ValueError: Placeholders and inputs do not match in number, or a sound is not 16 kHz mono.
        """
        kwargs.pop("videos", None)
        if images is None and text is None and audio is None:
            raise ValueError("nothing to process: pass text, images or audio")
        merged = self._merge_kwargs(self.valid_processor_kwargs, self.tokenizer.init_kwargs, **kwargs)
        data: dict[str, Any] = {}
        image_list = [read_image(image) for image in flat(images)]
        if image_list:
            data.update(self.image_processor(image_list, **{**merged["images_kwargs"], "return_tensors": "pt"}))
        counts = list(audio_token_counts or [])
        sounds = [read_audio(sound) for sound in flat(audio)]
        if sounds:
            if counts:
                raise ValueError("pass audio or audio_token_counts, not both")
            data.update(self.log_mels(sounds, sampling_rate=merged["audio_kwargs"]["sampling_rate"]))
            counts = [self.num_audio_tokens(len(sound)) for sound in sounds]
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            data.update(self._encode_prompts(prompts, len(image_list), counts, merged["text_kwargs"]))
        return BatchFeature(data, tensor_type=return_tensors)

    def log_mels(self, sounds: Sequence[NDArray[np.float32]], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Log-mels of sounds [samples], each padded with silence to whole chunks.

        Returns:
            input_features [n, frames, mels] and input_features_mask [n, frames].
        """
        settings = {"sampling_rate": self.feature_extractor.sampling_rate, **kwargs, "return_tensors": "pt"}
        return dict(self.feature_extractor(sounds, **settings))

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render messages, and with `tokenize=True` make the tensors; what people typed is never a marker.

        Args:
            conversation: Messages, or several lists of them, with roles system, user, assistant; content is a string
                or parts {"type": "text", "text"}, {"type": "image", "image" | "path"},
                {"type": "audio", "audio" | "path"}.
            **kwargs: As ProcessorMixin.apply_chat_template (add_generation_prompt, tokenize, return_dict,
                return_tensors, processor_kwargs …) and `enable_thinking`: False (default) closes an empty thought in
                the generation prompt, True leaves the thought to the model.
        """
        kwargs.pop("sanitize_control_tokens", None)
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        dialogues = conversation if batched else [conversation]
        guarded = [[_guarded(message) for message in dialogue] for dialogue in dialogues]
        return super().apply_chat_template(guarded if batched else guarded[0], chat_template, **kwargs)

    def encode_answer(self, answer: str, thought: str | None = None) -> list[int]:
        """The tokens that the model should generate after the generation prompt, the end marker included.

        With a thought, after `enable_thinking=True`: `<think>…</think><answer>…</answer>`; else `<answer>…</answer>`.
        """
        opening = "" if thought is None else BEGIN_THINK + guard(thought) + END_THINK
        return self._encode(pieces(opening + BEGIN_ANSWER + guard(answer) + END_ANSWER + END))[0]

    def split_answer(self, text: str) -> tuple[str, str]:
        """(thought, answer) of generated text."""
        return split_answer(text)

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes of a processor's output."""
        return [
            "input_ids",
            "attention_mask",
            "block_sequence_ids",
            "pixel_values",
            "input_features",
            "input_features_mask",
        ]

    @classmethod
    def _get_arguments_from_pretrained(
        cls,
        path: Any,
        processor_dict: Any = None,  # noqa: ARG003 (ProcessorMixin's signature)
        **kwargs: Any,
    ) -> list[Any]:
        for own in ("image_seq_length", "audio_lookahead_tokens"):
            kwargs.pop(own, None)
        # The PIL image processor by name: the automatic choice needs torchvision, and resizes differently with it.
        return [
            ViTImageProcessorPil.from_pretrained(path, **kwargs),
            AutoGlmFeatureExtractor.from_pretrained(path, **kwargs),
            AutoTokenizer.from_pretrained(path, **kwargs),
        ]

    def _encode_prompts(
        self, prompts: list[str], n_images: int, audio_token_counts: list[int], text_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        cut = [pieces(prompt) for prompt in prompts]
        repeats = {IMAGE: [self.image_seq_length] * n_images, AUDIO: audio_token_counts}
        for token, counts in repeats.items():
            places = sum(piece.is_marker and piece.text == token for row in cut for piece in row)
            if places != len(counts):
                raise ValueError(f"The prompts have {places} {token} but inputs for {len(counts)} of them were passed.")
        left = {token: iter(counts) for token, counts in repeats.items()}
        with_spans = bool(text_kwargs.get("return_offsets_mapping"))
        rows = [self._encode(row, left, with_spans=with_spans) for row in cut]
        limit = text_kwargs.get("max_length") if text_kwargs.get("truncation") else None
        ids, blocks_of, spans = ([row[part][:limit] for row in rows] for part in range(3))
        side = text_kwargs.get("padding_side") or "left"
        batch = self.tokenizer.pad(
            {"input_ids": ids},
            padding=text_kwargs.get("padding", False),
            max_length=text_kwargs.get("max_length"),
            pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
            padding_side=side,
        )
        lengths = [len(row) for row in batch["input_ids"]]
        data = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "block_sequence_ids": [fill(row, n, -1, side) for row, n in zip(blocks_of, lengths, strict=True)],
        }
        if text_kwargs.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if with_spans:
            data["offset_mapping"] = [fill(row, n, (0, 0), side) for row, n in zip(spans, lengths, strict=True)]
        return data

    def _encode(
        self, prompt_pieces: list[Piece], repeats: dict[str, Iterator[int]] | None = None, *, with_spans: bool = False
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Ids, blocks and characters of a prompt's tokens; every piece is tokenised alone, so none can merge."""
        texts = [piece.text for piece in prompt_pieces if not piece.is_marker]
        settings = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": with_spans}
        encoded = self.tokenizer(texts, **settings) if texts else {}
        tokens_of_texts = iter(encoded.get("input_ids", ()))
        spans_of_texts = iter(encoded.get("offset_mapping", ()))
        ids: list[int] = []
        blocks_of: list[int] = []
        spans: list[tuple[int, int]] = []
        for piece, block in zip(prompt_pieces, blocks(prompt_pieces), strict=True):
            if not piece.is_marker:
                tokens = next(tokens_of_texts)
                if with_spans:
                    spans += [(piece.start + first, piece.start + last) for first, last in next(spans_of_texts)]
            else:
                times = next(repeats[piece.text]) if repeats and piece.text in repeats else 1
                tokens = [self.tokenizer.convert_tokens_to_ids(piece.text)] * times
                spans += [(piece.start, piece.stop)] * (times if with_spans else 0)
            ids += tokens
            blocks_of += [block] * len(tokens)
        return ids, blocks_of, spans

    def _multimodal_inputs_from_conversations(
        self,
        conversations: Any,
        audio_loading_params: Any,  # noqa: ARG002 (ProcessorMixin's signature)
        load_audio_from_video: bool = False,  # noqa: ARG002
    ) -> tuple[list[list[Any]], list[list[Any]], list[Any], dict[str, Any]]:
        images: list[list[Any]] = []
        sounds: list[Any] = []
        for dialogue in conversations:
            images.append([])
            for part in (part for message in dialogue for part in parts(message)):
                if part["type"] == "image":
                    images[-1] += [part[key] for key in ("image", "path", "url") if key in part]
                elif part["type"] == "audio":
                    sounds += [part[key] for key in ("audio", "path", "url") if key in part]
        return images, [[] for _ in conversations], sounds, {}


def parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content parts of a message; a string is one text."""
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def fill(row: list[Any], length: int, value: Any, side: str) -> list[Any]:
    """`row` padded to `length` with `value` on the left or right."""
    padding = [value] * (length - len(row))
    return padding + row if side == "left" else row + padding


def _guarded(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose texts are data; an assistant's thought is dropped before its tags become data."""
    if message.get("role") == "assistant":
        spoken = "".join(part["text"] for part in parts(message) if part["type"] == "text")
        answer = guard(split_answer(spoken)[1])
        as_text = isinstance(message.get("content"), str)
        return {**message, "content": answer if as_text else [{"type": "text", "text": answer}]}
    if isinstance(message.get("content"), str):
        return {**message, "content": guard(message["content"])}
    content = [{**part, "text": guard(part["text"])} if part.get("type") == "text" else part for part in parts(message)]
    return {**message, "content": content}


__all__ = ["SPECIAL_TOKENS", "AutoGlmProcessor", "special_tokens"]
