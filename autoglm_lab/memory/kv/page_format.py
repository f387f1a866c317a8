"""What a page holds, and how exactly: keys and values as the model computes them, or in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from autoglm_lab.models.tensor_parallel import local_kv_heads

PAGE_TOKENS = 16
Precision = Literal["model", "int8", "int4"]
_GROUP = 32
_SMALLEST_SCALE = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True)
class PageFormat:
    """How the keys and values of `PAGE_TOKENS` tokens lie in a page, layer by layer.

    Of each layer a page holds codes ``[2, PAGE_TOKENS, kv_heads, code_width]`` and then, where they are quantised,
    their scales ``[2, PAGE_TOKENS, kv_heads, scale_width]`` in float16; the first index is 0 for keys, 1 for values.

    Attributes:
        dtype: of the model's keys and values.
        precision: ``int8``: a code a number, one scale a token and head, symmetric. ``int4``: two codes a byte
            (dimension d in the low half, d + head_dim / 2 in the high one), scale and minimum for every 32 dimensions.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    precision: Precision = "model"

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype, precision: Precision = "model") -> PageFormat | None:
        """The pages of a model; None where a layer keeps anything else than every token's keys and values."""
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        own = DynamicCache(config=config)
        growing = all(type(layer) is DynamicLayer for layer in own.layers)
        # Latent attention (DeepSeek's) keeps keys and values of different widths; layers that look at an image (Llama
        # 3.2's) keep it beside the tokens.
        beside = hasattr(text, "kv_lora_rank") or bool(getattr(text, "cross_attention_layers", None))
        if not growing or heads is None or beside:
            return None
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
            kv_heads = 1  # Falcon's and GPT-BigCode's way to say it
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
            return None
        return cls(text.num_hidden_layers, local_kv_heads(config, kv_heads), head_dim, dtype).at(precision)

    def at(self, precision: Precision) -> PageFormat:
        """The same keys and values in another precision; int4 needs an even ``head_dim``, else int8 it is."""
        possible: Precision = "int8" if precision == "int4" and self.head_dim % 2 else precision
        return replace(self, precision=possible)

    @property
    def code_width(self) -> int:
        return self.head_dim // 2 if self.precision == "int4" else self.head_dim

    @property
    def code_dtype(self) -> torch.dtype:
        return {"model": self.dtype, "int8": torch.int8, "int4": torch.uint8}[self.precision]

    @property
    def group(self) -> int:
        """Dimensions that share a scale."""
        return _GROUP if self.precision == "int4" and self.head_dim % _GROUP == 0 else self.head_dim

    @property
    def scale_width(self) -> int:
        """Numbers that scale one head of one token: none, one, or a scale and a minimum for each group."""
        return {"model": 0, "int8": 1, "int4": 2 * (self.head_dim // self.group)}[self.precision]

    @property
    def code_nbytes(self) -> int:
        """Bytes of a layer's codes in a page."""
        return 2 * PAGE_TOKENS * self.kv_heads * self.code_width * self.code_dtype.itemsize

    @property
    def layer_nbytes(self) -> int:
        """Bytes of a layer in a page."""
        return self.code_nbytes + 2 * PAGE_TOKENS * self.kv_heads * self.scale_width * 2

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return self.layers * self.layer_nbytes

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes ``[…, code_width]`` and scales ``[…, scale_width]`` of ``[…, head_dim]``."""
        if self.precision == "model":
            return values.to(self.dtype), None
        numbers = values.float()
        if self.precision == "int8":
            scale = (numbers.abs().amax(-1, keepdim=True) / 127).clamp_min(_SMALLEST_SCALE).half()
            return (numbers / scale.float() + 0.5).floor().clamp(-127, 127).to(torch.int8), scale
        grouped = numbers.unflatten(-1, (-1, self.group))
        low, high = grouped.amin(-1, keepdim=True).half(), grouped.amax(-1, keepdim=True)
        scale = ((high - low.float()) / 15).clamp_min(_SMALLEST_SCALE).half()
        codes = ((grouped - low.float()) / scale.float() + 0.5).floor().clamp(0, 15).to(torch.uint8).flatten(-2)
        packed = codes[..., : self.code_width] | (codes[..., self.code_width :] << 4)
        return packed, torch.cat([scale, low], dim=-1).flatten(-2)

    def decode(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        """The keys or values ``[…, head_dim]`` behind codes and scales, in the model's dtype."""
        if scales is None:
            return codes
        if self.precision == "int8":
            return (codes.float() * scales.float()).to(self.dtype)
        numbers = torch.cat([codes & 15, codes >> 4], dim=-1).float().unflatten(-1, (-1, self.group))
        pairs = scales.float().unflatten(-1, (-1, 2))
        scaled: Tensor = numbers * pairs[..., :1] + pairs[..., 1:]
        return scaled.flatten(-2).to(self.dtype)


class PageStore:
    """The pages in a region of memory.

    Args:
        region: ``uint8 [pages * stride]``.
        stride: bytes from one page to the next.

    Attributes:
        stride: bytes from one page to the next.
        codes: ``[pages, layers, 2, PAGE_TOKENS, kv_heads, code_width]``.
        scales: ``[pages, layers, 2, PAGE_TOKENS, kv_heads, scale_width]``; None where the format has none.
    """

    def __init__(self, form: PageFormat, region: Tensor, stride: int) -> None:
        self.form, self._region, self.stride = form, region, stride
        pages = region.numel() // stride
        self.codes = self._view(region.view(form.code_dtype), pages, form.code_width, 0)
        self.scales = None
        if form.scale_width:
            self.scales = self._view(region.view(torch.float16), pages, form.scale_width, form.code_nbytes)

    def _view(self, region: Tensor, pages: int, width: int, offset: int) -> Tensor:
        form, size = self.form, region.dtype.itemsize
        token = form.kv_heads * width
        strides = (self.stride // size, form.layer_nbytes // size, PAGE_TOKENS * token, token, width, 1)
        shape = (pages, form.layers, 2, PAGE_TOKENS, form.kv_heads, width)
        return region.as_strided(shape, strides, offset // size)

    def raw(self, page: int) -> Tensor:
        """A page as it lies in memory: ``uint8 [form.nbytes]``."""
        return self._region[page * self.stride : page * self.stride + self.form.nbytes]

    def layer_bytes(self, layer: int) -> Tensor:
        """One layer of every page as it lies in memory: ``int32 [pages, layer_nbytes / 4]``."""
        words, offset = self._region.view(torch.int32), layer * self.form.layer_nbytes // 4
        shape = (self._region.numel() // self.stride, self.form.layer_nbytes // 4)
        return words.as_strided(shape, (self.stride // 4, 1), offset)

    def write(self, layer: int, pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values ``[batch, new, kv_heads, head_dim]`` at pages and slots ``[batch, new]``."""
        for part, given in enumerate((keys, values)):
            codes, scales = self.form.encode(given)
            self.codes[pages, layer, part, slots] = codes
            if self.scales is not None and scales is not None:
                self.scales[pages, layer, part, slots] = scales

    def move(self, layer: int, pages: Tensor, slots: Tensor, to_pages: Tensor, to_slots: Tensor) -> None:
        """Copy one layer of tokens as they lie, each head from a place of its own; the places may overlap.

        Args:
            pages, slots: where each head of each token is, ``[tokens, kv_heads]``.
            to_pages, to_slots: where the tokens go, ``[tokens]``.
        """
        heads = torch.arange(self.form.kv_heads, device=pages.device)
        for stored in [self.codes] if self.scales is None else [self.codes, self.scales]:
            for part in (0, 1):
                stored[to_pages, layer, part, to_slots] = stored[pages, layer, part, slots, heads]

    def read(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of pages ``[batch, pages]``: ``[batch, kv_heads, pages * PAGE_TOKENS, head_dim]`` each."""
        keys, values = (
            self.form.decode(_picked(self.codes[:, layer, part], table), self._scales(layer, part, table))
            .flatten(1, 2)
            .transpose(1, 2)
            for part in (0, 1)
        )
        return keys, values

    def _scales(self, layer: int, part: int, table: Tensor) -> Tensor | None:
        return None if self.scales is None else _picked(self.scales[:, layer, part], table)


def _picked(stored: Tensor, table: Tensor) -> Tensor:
    """Rows ``[batch, pages, …]`` of ``stored`` in whole pieces of memory; a CPU's plain index goes number by number."""
    rows: Tensor = stored.index_select(0, table.flatten()).unflatten(0, table.shape)
    return rows
