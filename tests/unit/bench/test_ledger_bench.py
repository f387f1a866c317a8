from __future__ import annotations

import pytest

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.ledger import interval, run


def test_it_runs_small_and_judges_nothing_on_a_cpu() -> None:
    said: list[str] = []
    with Bench(small=True, say=said.append) as bench:
        report = run(bench)
        assert bench.workbench.sampler.running
    figures = {figure.name: figure for figure in report.figures}
    hidden = figures["500 MB hidden in a variable: found as unattributed"].ours
    assert hidden == pytest.approx(500_000_000, rel=0.05)
    assert "after loading: unattributed" in figures
    assert not report.missed
    assert any(note.startswith("95 % interval of that median") for note in report.notes)


def test_the_interval_holds_the_median_and_narrows_with_agreement() -> None:
    low, high = interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert low <= 3.0 <= high
    assert interval([2.0] * 20) == (2.0, 2.0)
