from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.errors import DatasetError
from autoglm_lab.training.dataset import read_dataset
from autoglm_lab.training.novelty import inputs_of, novel_directions
from autoglm_lab.training.step import Step


def line(question: str, *, keep: bool | None = None) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "<answer>Yes.</answer>"}]
    return {"messages": messages} if keep is None else {"messages": messages, "keep": keep}


DATA = [line("Is it brown?"), line("Is it 棕色?"), line("你是谁?", keep=True), line("Hello", keep=True)]


def test_the_first_direction_is_the_new_one() -> None:
    """New inputs are as the kept ones, and something else along one axis, which the kept ones hardly use."""
    torch.manual_seed(1)
    rows, width = 400, 32
    strengths = torch.linspace(3, 0.5, width)
    strengths[7] = 0.01
    kept, new = (torch.randn(rows, width) * strengths for _ in range(2))
    new[:, 7] += torch.randn(rows)
    found = novel_directions(new, kept, 3)
    assert found.shape == (3, width)
    first = found[0] / found[0].norm()
    assert abs(float(first[7])) > 0.95
    reads = [(some @ found.T).square().mean(0) for some in (new, kept)]
    torch.testing.assert_close(reads[0], torch.full((3,), 1 / 3))
    assert float(reads[1][0]) < 0.05 * float(reads[0][0])


@pytest.mark.parametrize(("rows", "width"), [(90, 40), (24, 64)])
def test_directions_solve_the_generalised_eigenproblem(rows: int, width: int) -> None:
    """As computed from whole matrices in float64, whichever of rows and width is more."""
    torch.manual_seed(2)
    kept, new = (torch.randn(rows, width) @ torch.randn(width, width) for _ in range(2))
    both = [some.double().T @ some.double() / rows for some in (new, kept)]
    lower = torch.linalg.cholesky(both[1] + 0.001 * both[1].diagonal().mean() * torch.eye(width))
    whitened = torch.linalg.solve_triangular(lower, both[0], upper=False)
    squares, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(lower, whitened.T, upper=False))
    expected = torch.linalg.solve_triangular(lower.T, vectors, upper=True).flip(1)[:, :3].T
    found = novel_directions(new, kept, 3).double()
    assert float(squares[-1] / squares[-4]) > 1.05
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(found, expected).abs(), torch.ones(3).double(), atol=1e-3, rtol=0
    )


def test_inputs_that_are_all_zero_or_too_few_are_no_error() -> None:
    few = novel_directions(torch.randn(2, 16), torch.randn(2, 16), 8)
    assert few.shape == (2, 16)
    assert few.isfinite().all()
    assert novel_directions(torch.randn(4, 8), torch.zeros(4, 8), 2).isfinite().all()
    assert novel_directions(torch.zeros(4, 8), torch.randn(4, 8), 2).isfinite().all()


def test_inputs_are_drawn_from_dialogues_all_over() -> None:
    layer = torch.nn.Linear(4, 2)
    drawn = inputs_of({"layer": layer}, list(range(150)), lambda at: layer(torch.full((1, 5, 4), float(at))), 0)
    seen = sorted(set(drawn["layer"][:, 0].tolist()))
    assert seen == [float(at) for at in range(0, 150, 3)]
    assert not layer._forward_pre_hooks


def test_a_layer_that_no_token_reaches_tells_nothing() -> None:
    """As an expert to which none is sent."""
    layers = {"busy": torch.nn.Linear(4, 2), "idle": torch.nn.Linear(4, 2)}

    def run(_dialogue: int) -> None:
        layers["busy"](torch.ones(1, 5, 4))
        layers["idle"](torch.ones(0, 4))

    assert set(inputs_of(layers, [1, 2], run, 0)) == {"busy"}


def test_a_line_says_what_is_to_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, DATA)))
    data = read_dataset(path)
    assert data.kept == (False, False, True, True)
    assert repr(data) == "data.jsonl: 4 dialogue(s), 2 of them to be kept"
    assert read_dataset(DATA[:2]).kept == ()
    with pytest.raises(DatasetError, match="line 1: 'keep' is true or false, not 'yes'"):
        read_dataset([{**DATA[0], "keep": "yes"}], strict=True)


def test_an_adapter_begins_with_what_is_new() -> None:
    """It still changes nothing, and reads kept dialogues less than new ones."""
    with lab.load("autoglm-tiny", device="cpu") as wb:
        before = {}
        for kept in (True, False):
            data = DATA if kept else [{"messages": one["messages"]} for one in DATA]
            wb.finetune(data, rank=4, steps=1, learning_rate=1e-12).result(60)
            before[kept] = wb.tuner._adapters.layers("default")
            wb.tuner.remove()
        name = next(path for path in before[True] if path.endswith("layers.3.mlp.down_proj"))
        first, plain = (before[kept][name].lora_A["default"].weight for kept in (True, False))
        assert not torch.equal(first, plain)
        assert not before[True][name].lora_B["default"].weight.abs().max() > 1e-9
        again = wb.finetune(DATA, rank=4, steps=1, learning_rate=1e-12)
        again.result(60)
        same = wb.tuner._adapters.layers("default")[name].lora_A["default"].weight
        torch.testing.assert_close(same, first)


def test_stop_is_obeyed_while_what_is_new_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(Step, "look", lambda _step, dialogue: seen.append(dialogue))
    with lab.load("autoglm-tiny", device="cpu") as wb:
        run = wb.finetune(DATA, rank=4, steps=3, watch=lambda run: run.stop() if "new" in run.note else None)
        assert run.result(60).stopped
        assert (run.state, run.step, seen) == ("stopped", 1, [])
