"""Keys and values that live on the host, brought to the GPU one layer ahead of the layer that computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoglm_lab.memory.kv import paged_kernels
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat, PageStore
from autoglm_lab.memory.kv.paged_kernels import Pages

_GRAIN = 512


@dataclass(frozen=True)
class _Stage:
    """Room on the GPU for one layer's pages of every row."""

    form: PageFormat
    store: PageStore


class HostPrefetch:
    """Two stages that take turns: while one layer is read from the first, the next layer comes into the second.

    Everything is queued on streams, so that it can be captured; which pages come is read on the device.

    Args:
        pages: the pool's, on the host.
        table: pages of each row, ``int32 [batch, width]``.
        lengths: tokens of each row with the new one, ``int32 [batch]``.
        width: pages of a row that the stages have room for.
    """

    def __init__(self, pages: Pages, table: Tensor, lengths: Tensor, width: int) -> None:
        self._pages, self._table, self._lengths, self._width = pages, table, lengths, width
        batch, device = table.shape[0], table.device
        form = replace(pages.form, layers=1)
        stride = -(-form.nbytes // _GRAIN) * _GRAIN
        self._stages = [
            _Stage(form, PageStore(form, torch.empty(batch * width * stride, dtype=torch.uint8, device=device), stride))
            for _ in range(2)
        ]
        self._own = torch.arange(batch * width, dtype=torch.int32, device=device).view(batch, width)
        self._stream = torch.cuda.Stream(device)
        self._come: dict[int, torch.cuda.Event] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the stages."""
        return sum(stage.store.codes.untyped_storage().nbytes() for stage in self._stages)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put the new token's keys and values ``[batch, kv_heads, 1, head_dim]``, and let the next layer come."""
        if layer == 0:
            self._bring(0)
        torch.cuda.current_stream().wait_event(self._come[layer])
        paged_kernels.write(self._stages[layer % 2], 0, keys, values, self._own, self._lengths)
        if layer + 1 < self._pages.form.layers:
            self._bring(layer + 1)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """As `paged_kernels.attend`, over the layer that has come."""
        return paged_kernels.attend(self._stages[layer % 2], 0, query, scale, self._own, self._lengths)

    def _bring(self, layer: int) -> None:
        # The stage was read by the layer before the one that computes now, which is queued already.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            stage = self._stages[layer % 2]
            paged_kernels.copy(self._pages, layer, stage, self._table, self._lengths, self._width)
            self._come[layer] = torch.cuda.Event()
            self._come[layer].record(self._stream)


def stage_width(tokens: int) -> int:
    """Pages of a row for ``tokens``, in few different sizes: 256 and its doubles."""
    pages = -(-tokens // PAGE_TOKENS)
    return max(256, 1 << (pages - 1).bit_length())
