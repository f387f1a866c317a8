"""The benches run small on the embedded model, and what they check about correctness holds there."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.bench import Figure, Report, load_worker
from autoglm_lab.bench import load as load_bench
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.catalog import runner
from autoglm_lab.bench.prefill import read
from autoglm_lab.bench.prompts import length, prompt_of, said, screen, text_of, user
from autoglm_lab.bench.soak import slope_of
from autoglm_lab.bench.stock import Stock
from autoglm_lab.bench.traffic import Scale, Traffic
from autoglm_lab.errors import LabError
from autoglm_lab.models import catalog
from autoglm_lab.models.anatomy import named_tensors
from autoglm_lab.models.skeleton import model_class


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    torch.set_num_threads(1)
    with Bench(small=True, say=lambda _: None) as session:
        yield session


def run(bench: Bench, name: str) -> Report:
    report = runner(name)(bench)
    bench.reset()
    return report


def figure(report: Report, words: str) -> Figure:
    (found,) = [one for one in report.figures if words in one.name]
    return found


def is_as_before(bench: Bench) -> bool:
    wb = bench.workbench
    return not wb.conversations and wb.policy == lab.MemoryPolicy() and not wb.memory.of_kind("kv")


def test_prefill_is_measured_beside_transformers_and_its_limit(bench: Bench) -> None:
    report = run(bench, "prefill")
    for one in report.figures:
        assert one.meets is None, "a small run judges no bar"
        assert "transformers" in one.peers
        assert one.ours is None or one.ours > 0
    times = [one for one in report.figures if one.unit == "s"]
    assert all(one.limit is not None and one.ours is not None and one.limit < one.ours for one in times)
    assert is_as_before(bench)


def test_decoding_and_precisions_are_measured_and_lossless_settings_equal_stock(bench: Bench) -> None:
    report = run(bench, "kv")
    assert figure(report, "batch 4").ours > 0  # type: ignore[operator]
    half = figure(report, "int8: keys and values")
    assert half.ours < half.peers["as the model"]  # type: ignore[operator]
    assert figure(report, "equal to generate's").meets is True
    assert figure(report, "batch of four equal").meets is True
    largest = figure(report, "largest difference")
    assert largest.ours <= largest.peers["eager"]  # type: ignore[operator]
    assert is_as_before(bench)


def test_turns_reuse_what_is_kept_and_answer_the_same(bench: Bench) -> None:
    report = run(bench, "turns")
    assert "64 new tokens on 256 kept" in report.figures[0].name
    assert figure(report, "least share").ours > 60  # type: ignore[operator]
    assert figure(report, "equal to those without reuse").meets is True
    assert is_as_before(bench)


def test_a_phone_agents_steps_reuse_all_but_the_new(bench: Bench) -> None:
    report = run(bench, "trace")
    assert figure(report, "prompt reused").ours > 50  # type: ignore[operator]
    assert sum("first token" in one.name and one.name.startswith("step") for one in report.figures) == 4
    assert is_as_before(bench)


def test_a_soak_leaves_nothing_and_answers_the_same_alone(bench: Bench) -> None:
    report = run(bench, "soak")
    assert figure(report, "not the package's own").ours == 0, report.notes
    alone = figure(report, "equal when asked alone")
    assert alone.limit  # some were sampled
    assert alone.meets is True
    assert figure(report, "owners whose bytes differ").meets is True, report
    assert is_as_before(bench)


def test_stock_stands_on_the_same_weights(bench: Bench) -> None:
    wb = bench.workbench
    stock = Stock(wb)
    ours = wb.model.state_dict()
    assert all(one.data_ptr() == ours[name].data_ptr() for name, one in stock.model.named_parameters())
    ids = stock.generate(stock.batch([user("Tap the red icon", screen(0, 224, 224))]), 12, least=1)
    again = wb.model.generate(  # type: ignore[operator]
        **stock.batch([user("Tap the red icon", screen(0, 224, 224))]), do_sample=False, max_new_tokens=12
    )
    assert ids[0].tolist() == again[0, -ids.shape[1] :].tolist()


@pytest.mark.parametrize("tokens", [40, 200])
def test_a_prompt_has_the_tokens_that_were_asked_for(bench: Bench, tokens: int) -> None:
    text = prompt_of(bench.workbench, tokens, seed=3)
    assert tokens - 4 <= length(bench.workbench, [user(text)]) <= tokens
    assert text == prompt_of(bench.workbench, tokens, seed=3)
    assert text_of(bench.workbench, 5, seed=1) != text_of(bench.workbench, 5, seed=2)


def test_a_prompt_that_is_read_again_is_no_longer_than_before(bench: Bench) -> None:
    answers = [read(bench.workbench, prompt_of(bench.workbench, 64, seed=1)) for _ in range(2)]
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens
    bench.reset()


def test_a_screen_is_the_same_for_the_same_seed() -> None:
    assert screen(1, 90, 200).tobytes() == screen(1, 90, 200).tobytes() != screen(2, 90, 200).tobytes()


def test_a_crash_is_told_apart_from_a_typed_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic(bench.workbench, Scale(40, 64, 4, sample=1.0), seed=1)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("illegal memory access")

    with monkeypatch.context() as patched:
        patched.setattr(bench.workbench.engine.state.stepper, "prefill", broken)
        traffic.request()
        traffic.land()
    assert traffic.outcomes["crashed"] == 1
    assert "illegal memory access" in traffic.crashes[0]
    traffic.request()
    traffic.land()
    assert traffic.outcomes["crashed"] == 1
    bench.reset()


def test_the_slope_is_that_of_the_best_line() -> None:
    assert slope_of([(0.0, 5), (1.0, 7), (2.0, 9)]) == pytest.approx(2.0)
    assert slope_of([(0.0, 10), (1.0, 0), (2.0, 10)]) == pytest.approx(0.0)
    assert slope_of([(1.0, 3)]) == 0.0


def test_two_devices_are_measured_beside_one(bench: Bench) -> None:
    report = run(bench, "devices")
    assert figure(report, "the text of one device").meets is True, report
    assert not report.missed


def test_a_wrong_answer_is_seen(bench: Bench) -> None:
    from autoglm_lab.bench.soak import _again
    from autoglm_lab.bench.traffic import Case

    asked = [said("user", "Who are you?")]
    answer = bench.workbench.engine.submit(asked, conversation="case", max_new_tokens=6).result(60)
    cases = [Case(asked, 6, answer.text), Case(asked, 6, answer.text[:3] + "?")]
    right, wrong = _again(bench.workbench, cases)
    assert right == 1.0
    assert wrong < 1.0
    bench.reset()


def test_loading_is_measured_in_fresh_processes_and_leaves_no_files(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    asked: list[str] = []

    def here(command: list[str], **_: object) -> SimpleNamespace:
        """The same program without a process of its own: starting one takes longer than the load."""
        said = io.StringIO()
        assert command[1:3] == ["-m", "autoglm_lab.bench.load_worker"]
        asked.append(command[3])
        with contextlib.redirect_stdout(said):
            load_worker.main(command[3:])
        return SimpleNamespace(returncode=0, stdout=said.getvalue(), stderr="")

    asks = SimpleNamespace(run=here, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(load_bench, "subprocess", asks)
    report = run(bench, "load")
    assert asked == ["limits", "stock", "ours"]
    rate = figure(report, "rate")
    assert rate.ours > 0 and rate.peers["from_pretrained"] > 0  # type: ignore[operator]
    assert rate.limit == pytest.approx(figure(report, "files into memory").ours)
    assert figure(report, "until one can chat").ours > 0  # type: ignore[operator]
    assert figure(report, "peak on the device").ours is None, "no GPU"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_made_up_weights_loads_in_transformers_and_here_alike(tmp_path: Path) -> None:
    config = catalog.preset("autoglm-tiny").config()
    nbytes, largest = load_bench.write_folder(tmp_path, config, 4_000_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert max(path.stat().st_size for path in files) - largest < 100_000
    stock: Any = model_class(config).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert sum(one.nbytes for _, one in named_tensors(stock)) == nbytes
    expected = stock.state_dict()
    with lab.load(tmp_path, device="cpu", dtype="bfloat16") as wb:
        values = wb.model.state_dict()
        wrong = [name for name in expected if not torch.equal(values[name], expected[name])]
        del values
    assert wrong == []


def test_a_load_that_fails_in_its_process_says_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nLoadError: no such folder\n")
    asks = SimpleNamespace(run=lambda *_, **__: failed, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(load_bench, "subprocess", asks)
    with pytest.raises(LabError, match=r"loading with stock failed:\nTraceback\nLoadError: no such folder"):
        load_bench._process("stock", Path(), bench)


def test_a_folder_without_room_says_so_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(LabError, match=r"has 953\.7 MiB free, the weights take .*: set TMPDIR"):
        load_bench.write_folder(tmp_path, catalog.preset("autoglm-tiny").config(), 4_000_000)
    assert list(tmp_path.iterdir()) == []
