"""A workbench of its own for the tests that train, and a little data to train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.samples import SAMPLES
from autoglm_lab.training.dataset import Dataset, read_dataset


@pytest.fixture(scope="module")
def trained() -> Iterator[lab.Workbench]:
    torch.set_num_threads(1)
    with lab.load("autoglm-tiny", device="cpu") as workbench:
        yield workbench


@pytest.fixture
def wb(trained: lab.Workbench) -> Iterator[lab.Workbench]:
    """The embedded model without adapters and with the default policy."""
    yield trained
    trained.tuner.remove()
    trained.policy = lab.MemoryPolicy()
    for module in trained.modules.values():
        module.wake()
    for info in trained.conversations:
        trained.drop(info.name)


@pytest.fixture
def small_batches(wb: lab.Workbench) -> None:
    """Steps of two dialogues."""
    wb.policy = wb.policy.replace(training={"micro_batch": 2, "accumulation": 1})


def weights(wb: lab.Workbench) -> dict[str, torch.Tensor]:
    """The adapters' weights, by name."""
    return {name: value.detach().clone() for name, value in wb.model.named_parameters() if ".lora_" in name}


def lines(count: int = 6) -> list[dict[str, Any]]:
    """Dialogues over the package's samples, answers as they are or made up."""
    found = []
    for number in range(count):
        sample = SAMPLES[number % 2]  # the two screens
        content = [{"type": "image", "image": str(sample.image)}, {"type": "text", "text": sample.prompt["en"]}]
        answer = f'<answer>finish(message="{"brown " * (1 + number % 3)}")</answer>'
        found.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    return found


@pytest.fixture
def data() -> Dataset:
    return read_dataset(lines())


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """A file with one good dialogue, a screen beside it."""
    (tmp_path / "screen.png").write_bytes(Path(str(SAMPLES[0].image)).read_bytes())
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": [{"type": "image", "image": "screen.png"}, '
        '{"type": "text", "text": "Tap the red circle"}]}, '
        '{"role": "assistant", "content": "<think>Top.</think><answer>do(action=\\"Tap\\", element=[500,20])</answer>"}'
        "]}\n",
        encoding="utf-8",
    )
    return path
