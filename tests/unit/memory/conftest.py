"""A tiny real model with vision, projector, text and head, on disk and under residency."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from autoglm_lab.memory.accelerator import Accelerator, open_accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.models.loading import resolve
from autoglm_lab.models.skeleton import model_class
from autoglm_lab.policy import MemoryPolicy
from tests.unit.models.tiny_models import llava

IDS = torch.arange(20, 32)[None]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llava")
    config = llava()
    model_class(config)(config).save_pretrained(path)
    return path


@pytest.fixture
def accelerator() -> Accelerator:
    return open_accelerator("cpu")


@pytest.fixture
def events() -> list[Event]:
    return []


Build = Callable[..., Residency]


@pytest.fixture
def build(folder: Path, accelerator: Accelerator, events: list[Event]) -> Iterator[Build]:
    """Make a residency of the saved model (or of dummy weights), closed at the end."""
    made: list[Residency] = []

    def make(weights: str | None = None, policy: MemoryPolicy | None = None) -> Residency:
        source = llava() if weights == "dummy" else folder
        resolved = resolve(source, weights=weights, device="cpu")
        made.append(Residency(resolved, accelerator, policy=policy, on_event=events.append))
        return made[-1]

    yield make
    for residency in made:
        residency.close()


@pytest.fixture
def loaded(build: Build) -> Residency:
    residency = build()
    residency.materialise()
    return residency


def logits(residency: Residency) -> torch.Tensor:
    with torch.no_grad():
        return residency.model(input_ids=IDS).logits.clone()


def checksums(residency: Residency) -> dict[str, int]:
    """The bytes of every tensor, as one number each."""
    return {
        name: int(tensor.detach().contiguous().view(-1).view(torch.uint8).to(torch.int64).sum())
        for name, tensor in residency.model.named_parameters()
    }
