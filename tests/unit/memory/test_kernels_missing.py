"""Where the page kernels cannot be compiled, the plain way is taken."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from autoglm_lab.memory.kv import paged_kernels
from autoglm_lab.memory.kv.page_format import PageFormat, PageStore


@dataclass(frozen=True)
class Pages:
    form: PageFormat
    store: PageStore


def test_kernels_that_cannot_be_compiled_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def no_compiler() -> None:
        asked.append(1)
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(paged_kernels, "_triton", lambda: True)
    monkeypatch.setattr(paged_kernels, "_kernels", no_compiler)
    monkeypatch.setattr(paged_kernels, "_verdicts", {})
    form = PageFormat(1, 2, 64, torch.float32)
    pages = Pages(form, PageStore(form, torch.zeros(form.nbytes, dtype=torch.uint8), form.nbytes))
    assert paged_kernels.possible(pages)
    assert not paged_kernels.available(pages)
    assert paged_kernels.why_not(pages) == "RuntimeError: Failed to find C compiler."
    assert not paged_kernels.available(pages)
    assert len(asked) == 1, "it is tried once"


def test_heads_of_an_odd_width_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_kernels, "_triton", lambda: True)
    form = PageFormat(1, 2, 80, torch.float32)
    pages = Pages(form, PageStore(form, torch.zeros(form.nbytes, dtype=torch.uint8), form.nbytes))
    assert not paged_kernels.possible(pages)
