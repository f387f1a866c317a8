"""Keys and values of a planned step: the shapes that `PagedCache` has on a device, without pages."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import Cache

from autoglm_lab.memory.kv import paged_kernels
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat
from autoglm_lab.memory.kv.paged_cache import PagedCache, PagedLayer
from autoglm_lab.memory.planning.recorder import flash


def alike(form: PageFormat, kind: Literal["cuda", "cpu"], before: int) -> PageFormat:
    """The form whose steps allocate what those of ``form`` do, and which is traced in its place.

    The kernels of CUDA read and write pages of any precision as they lie. Only the first tokens of a prompt differ:
    rounded ones are read back, others are at hand.
    """
    if kind == "cpu" or not paged_kernels.fits(form):
        return form
    return form.at("model" if before or form.precision == "model" else "int8")


class TracedCache(PagedCache):
    """Takes keys and values of a step and allocates what the device would.

    Args:
        before: tokens of each row that are there already.
        layers: of the model as it is traced.
        ours: whether the decoder's attention is the one over pages.
    """

    def __init__(
        self,
        form: PageFormat,
        kind: Literal["cuda", "cpu"],
        batch: int,
        before: int,
        new_tokens: int,
        layers: int,
        *,
        ours: bool,
    ) -> None:
        self._form, self._batch = form, batch
        self._kind = kind
        self._cuda = kind == "cuda" and paged_kernels.fits(form)
        self.before, self.new_tokens, self.longest = [before] * batch, new_tokens, before + new_tokens
        self.gathers = not ours
        self._given: tuple[Tensor, Tensor] | None = None
        pages = -(-self.longest // PAGE_TOKENS)
        self.table = torch.zeros(batch, pages, dtype=torch.int32)
        self.lengths = torch.zeros(batch, dtype=torch.int32)
        Cache.__init__(self, layers=[PagedLayer(self, index) for index in range(layers)])

    @property
    def on_cpu(self) -> bool:
        return self._kind == "cpu"

    def put(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        del layer
        if not self._cuda:
            for one in (keys, values):
                self._form.encode(one.transpose(1, 2))
        self._given = keys, values
        return self.read() if self.gathers else (keys, values)

    def read(self) -> tuple[Tensor, Tensor]:
        assert self._given is not None
        keys, values = self._given
        form = self._form
        if not any(self.before) and form.precision == "model":
            return keys, values
        if self._cuda:
            both = keys.new_empty(2, self._batch, form.kv_heads, self.longest, form.head_dim)
            return both[0], both[1]
        keys, values = (self._picked(keys).flatten(1, 2).transpose(1, 2) for _ in range(2))
        return keys[:, :, : self.longest], values[:, :, : self.longest]

    def _picked(self, like: Tensor) -> Tensor:
        """Keys or values of the pages as `PageStore.read` picks and decodes them."""
        form, shape = self._form, (self._batch, self.table.shape[1], PAGE_TOKENS, self._form.kv_heads)
        codes = like.new_empty(*shape, form.code_width, dtype=form.code_dtype)
        scales = like.new_empty(*shape, form.scale_width, dtype=torch.float16) if form.scale_width else None
        return form.decode(codes, scales)

    def let_go(self) -> None:
        """The step is over: hold the last layer's keys and values no longer."""
        self._given = None

    def attend(self, query: Tensor, scale: float) -> Tensor | None:
        """Of one new token over pages; of more as FlashAttention does; None where the model's own code goes on."""
        del scale
        if not self._cuda or (self.new_tokens > 1 and query.dtype not in (torch.float16, torch.bfloat16)):
            return None
        if self.new_tokens > 1:
            _, values = self.read()
            return flash(query, values).transpose(1, 2)
        batch, heads, _, dim = query.shape
        splits = paged_kernels.splits_of(batch, self._form.kv_heads)
        work = [query.new_empty(batch, heads, splits, width, dtype=torch.float32) for width in (dim, 2)]
        result = query.new_empty(batch, 1, heads, dim)
        del work
        return result

    def mask(self, dtype: torch.dtype, *, additive: bool) -> Tensor | None:
        """None: the rows of a planned step are equally long."""
        del dtype, additive
        return None
