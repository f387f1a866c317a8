"""Kernels compiled while a model is being loaded, so that its first answer does not wait for them."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch

from autoglm_lab.engine.lean_forward import LeanForward
from autoglm_lab.memory.kv import paged_kernels
from autoglm_lab.memory.kv.kv_pool import KvPool


class CompileAhead:
    """Compiles the kernels of one model's steps on a thread of its own; `wait` before the first of them is captured.

    What cannot be compiled here is done without: `paged_kernels.available` and `LeanForward` find out the same.
    """

    def __init__(self, model: Any, pool: KvPool) -> None:
        heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
        # The pool may be closed before the thread comes to it: what is compiled depends on its format alone.
        arguments = (paged_kernels.pages_of(pool), heads, LeanForward.norm_shapes(model))
        self._thread = threading.Thread(target=_compile, args=arguments, name="autoglm-lab kernels", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()


def _compile(pages: paged_kernels.Pages, heads: int | None, norms: set[tuple[int, torch.dtype]]) -> None:
    device = pages.store.codes.device
    with torch.cuda.device(device):
        if paged_kernels.available(pages, heads):
            with contextlib.suppress(Exception):  # a norm that cannot be compiled keeps its own forward
                LeanForward.compile_norms(norms, device)
