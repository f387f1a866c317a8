from __future__ import annotations

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.precision import run


def test_it_runs_small_and_judges_nothing() -> None:
    with Bench(small=True, say=lambda _: None) as bench:
        report = run(bench)
    figures = {figure.name: figure for figure in report.figures}
    held = {
        precision: figures[f"weights on the device, in {precision}"].ours or 0
        for precision in ("model", "int8", "int4", "2:4")
    }
    assert held["int4"] < held["int8"] < held["2:4"] < held["model"]
    for precision in ("int8", "int4", "2:4"):
        decoding = figures[f"decoding, batch 1, weights in {precision}"]
        assert decoding.ours
        assert decoding.peers["as the model"] == figures["decoding, batch 1, weights in model"].ours
        assert (decoding.limit or 0) > (figures["decoding, batch 1, weights in model"].limit or 0)
        assert figures[f"product of 1 with 96 to 256 in {precision}"].ours
    assert figures["the process, weights in int4"].bar == "<= 8 GiB"
    assert all(figure.meets is None for figure in report.figures)
