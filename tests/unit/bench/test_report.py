from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from autoglm_lab import cli
from autoglm_lab.bench import CATALOG, Figure, Report
from autoglm_lab.bench import command as bench_command
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.catalog import chosen
from autoglm_lab.errors import LabError

MACHINE = {"device": "a card", "torch": "2.13", "command": "autoglm-lab bench kv"}


def report() -> Report:
    return Report(
        "decoding",
        MACHINE,
        (
            Figure("decode", "tokens/s", 95.0, {"stock": 25.0}, limit=231.0, bar=">= 3.5x stock", meets=True),
            Figure("peak", "B", 3 << 30, {"stock": 4 << 30, "other": None}, bar="<= 2 GiB", meets=False),
            Figure("start", "s", 0.05),
        ),
        ("single runs",),
    )


def test_a_report_shows_ours_beside_each_peer_with_units_and_verdicts() -> None:
    lines = str(report()).splitlines()
    assert lines[1] == "a card · torch 2.13 · command autoglm-lab bench kv"
    assert lines[3].split() == ["what", "ours", "stock", "other", "limit", "bar"]
    assert "95 tokens/s" in lines[5]
    assert "25 tokens/s" in lines[5]
    assert "231 tokens/s" in lines[5]
    assert lines[5].endswith(">= 3.5x stock  met")
    assert lines[6].split()[1:6] == ["3.00", "GiB", "4.00", "GiB", "n/a"]
    assert lines[6].endswith("MISSED")
    assert lines[7].split() == ["start", "50", "ms"]
    assert lines[-1] == "single runs"


def test_a_report_knows_which_bars_it_missed() -> None:
    assert [figure.name for figure in report().missed] == ["peak"]


def test_markdown_has_the_command_and_a_table() -> None:
    text = report().to_markdown()
    assert "`autoglm-lab bench kv`; a card, torch 2.13." in text
    assert "| decode | 95 tokens/s | 25 tokens/s |  | 231 tokens/s | >= 3.5x stock | met |" in text


def test_a_small_run_judges_nothing() -> None:
    assert Bench(small=True).judge(meets=False) is None


def test_an_unknown_bench_lists_the_known_ones() -> None:
    with pytest.raises(LabError, match=r"no bench 'speed': use load, swap, prefill, .* or all"):
        chosen(["speed"])
    assert chosen(["all"]) == tuple(CATALOG)


def test_one_bench_that_fails_leaves_the_others_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runner(name: str) -> Any:
        def run(_: Bench) -> Report:
            if name == "kv":
                raise RuntimeError("no kernel")
            return report()

        return run

    monkeypatch.setattr(bench_command, "runner", runner)
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(cli.app, ["bench", "kv", "turns", "--small", "--json", str(file)])
    assert result.exit_code == 1
    written = json.loads(file.read_text())
    assert list(written["reports"]) == ["turns"]
    assert written["reports"]["turns"]["figures"][0]["peers"] == {"stock": 25.0}
    assert "no kernel" in written["failures"]["kv"]


def test_a_bench_that_fails_leaves_the_model_as_it_was_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def runner(name: str) -> Any:
        def run(session: Bench) -> Report:
            seen.append(len(session.workbench.conversations))
            session.workbench.chat("hello", max_new_tokens=2).result(60)
            if name == "kv":
                raise RuntimeError("no kernel")
            return report()

        return run

    monkeypatch.setattr(bench_command, "runner", runner)
    CliRunner().invoke(cli.app, ["bench", "kv", "turns", "--small"])
    assert seen == [0, 0]


def test_the_command_of_a_run_names_the_benches_and_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace(command="")

    def run(session: Bench) -> Report:
        seen.command = session.machine()["command"]
        return report()

    monkeypatch.setattr(bench_command, "runner", lambda _: run)
    result = CliRunner().invoke(cli.app, ["bench", "soak", "--small", "--minutes", "10"])
    assert result.exit_code == 0, result.output
    assert seen.command == "autoglm-lab bench soak --small --minutes 10"
