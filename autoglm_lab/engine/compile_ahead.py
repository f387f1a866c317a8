"""Kernels compiled while a model is being loaded, so that its first answer does not wait for them."""

from __future__ import annotations

import threading
from typing import Any

import torch

from autoglm_lab.engine.lean_forward import LeanForward
from autoglm_lab.memory import paged_kernels
from autoglm_lab.memory.kv_pool import KvPool


class CompileAhead:
    """Compiles the kernels of one model's steps on a thread of its own; `wait` before the first of them is captured.

    What cannot be compiled fails at the step that needs it, with its own message.
    """

    def __init__(self, model: Any, pool: KvPool) -> None:
        heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
        arguments = (pool.form, pool.page_bytes, heads, pool.store.codes.device, LeanForward.norm_shapes(model))
        self._thread = threading.Thread(target=_compile, args=arguments, name="autoglm-lab kernels", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()


def _compile(form: Any, stride: int, heads: int, device: torch.device, norms: set[tuple[int, torch.dtype]]) -> None:
    try:
        with torch.cuda.device(device):
            paged_kernels.compile_for(form, stride, heads, device)
            LeanForward.compile_norms(norms, device)
    except Exception:  # noqa: BLE001, S110 - see the class
        pass
