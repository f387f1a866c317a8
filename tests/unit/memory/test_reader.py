from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autoglm_lab.errors import LoadError
from autoglm_lab.memory.residency import reader, weights
from autoglm_lab.memory.residency.staging import Staging
from autoglm_lab.models.checkpoint import FileTensor, read_header

CPU = torch.device("cpu")
Fill = Callable[..., dict[str, Tensor]]


class Interrupted(BaseException):
    """As Ctrl-C, which the tests' own runner would take for its own."""


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, FileTensor]:
    torch.manual_seed(0)
    for shard in range(3):
        tensors = {f"{shard}.{name}": torch.randn(rows, 37) for name, rows in (("a", 700), ("b", 1), ("c", 33))}
        tensors[f"{shard}.empty"] = torch.empty(0, 4)
        tensors[f"{shard}.half"] = torch.randn(501, 3).bfloat16()
        save_file(tensors, tmp_path / f"{shard}.safetensors")
    found: dict[str, FileTensor] = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        found |= read_header(path)
    return found


@pytest.fixture(params=["alone", "in threads"])
def threaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """One thread, or several however little there is to read; none of them is left at the end."""
    if request.param == "in threads":
        monkeypatch.setattr(reader, "_ALONE", 0)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
    before = set(threading.enumerate())
    yield request.param == "in threads"
    assert set(threading.enumerate()) <= before


def opened(folder: Path) -> list[str]:
    """Files of ``folder`` that this process has open; what other threads open and close meanwhile is none of them."""
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(handle.readlink()))
    return [name for name in found if name.startswith(str(folder))]


def expected(sources: dict[str, FileTensor]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: load_file(source.path)[name] for name, source in sources.items()}


def empty(sources: dict[str, FileTensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: torch.empty(one.shape, dtype=dtype or one.dtype) for name, one in sources.items()}


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_every_value_comes_whole_through_small_buffers(
    sources: dict[str, FileTensor], threaded: bool, staged: bool, dtype: torch.dtype | None
) -> None:
    staging = Staging(CPU, chunk=1000, lanes=3)
    staging.staged = staged
    targets, counted = empty(sources, dtype), list[int]()
    weights.fill_all(targets, sources, staging, counted.append)
    for name, value in expected(sources).items():
        assert torch.equal(targets[name], value.to(targets[name].dtype)), name
    assert sum(counted) == sum(target.nbytes for target in targets.values())
    assert staging.held == 0


def test_buffers_stay_while_someone_reads_and_are_as_large_as_they_need_to_be(sources: dict[str, FileTensor]) -> None:
    staging = Staging(CPU, chunk=1 << 16, lanes=2)
    staging.staged = True
    with staging:
        weights.fill_all(empty(sources), sources, staging, lambda _: None)
        assert 0 < staging.held <= 2 * 2 * (1 << 16)
    assert staging.held == 0


def test_a_file_is_read_from_front_to_back(sources: dict[str, FileTensor]) -> None:
    order = sorted(sources, reverse=True)
    pieces = list(weights._pieces({name: torch.empty(sources[name].shape) for name in order}, sources, 4096))
    places = [(piece.source.path, piece.offset) for piece in pieces]
    assert places == sorted(places)
    assert sum(piece.nbytes for piece in pieces) == sum(source.nbytes for source in sources.values())


@pytest.mark.parametrize("staged", [False, True])
def test_a_file_that_became_shorter_is_named_and_nothing_is_left(
    sources: dict[str, FileTensor], threaded: bool, staged: bool
) -> None:
    path = sources["1.a"].path
    path.write_bytes(path.read_bytes()[:-5000])
    staging = Staging(CPU, chunk=1000, lanes=3)
    staging.staged = staged
    with pytest.raises(LoadError, match=r"1\.safetensors became shorter since the model was resolved"):
        weights.fill_all(empty(sources), sources, staging, lambda _: None)
    assert staging.held == 0
    assert opened(path.parent) == []


def test_a_file_that_is_gone_is_named(sources: dict[str, FileTensor], threaded: bool) -> None:
    sources["2.a"].path.unlink()
    with pytest.raises(LoadError, match=r"cannot read the weights in .*2\.safetensors: No such file"):
        weights.fill_all(empty(sources), sources, Staging(CPU), lambda _: None)


@pytest.mark.parametrize("staged", [False, True])
def test_an_interrupt_ends_every_thread_before_it_is_raised(
    sources: dict[str, FileTensor], threaded: bool, staged: bool
) -> None:
    def interrupt(_: int) -> None:
        raise Interrupted

    staging = Staging(CPU, chunk=1000, lanes=3)
    staging.staged = staged
    with pytest.raises(Interrupted):
        weights.fill_all(empty(sources), sources, staging, interrupt)
    assert staging.held == 0


def test_a_second_interrupt_still_waits_for_the_threads() -> None:
    class Stubborn:
        """A thread that ends at the third look."""

        left = 3

        def is_alive(self) -> bool:
            return self.left > 0

        def join(self) -> None:
            self.left -= 1
            if self.left == 1:
                raise KeyboardInterrupt

    thread = Stubborn()
    with pytest.raises(KeyboardInterrupt):
        reader._join([thread])  # type: ignore[list-item]
    assert thread.left == 0
