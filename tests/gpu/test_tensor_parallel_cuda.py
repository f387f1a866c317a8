"""Several GPUs that compute every layer together, over NCCL. Needs two of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.errors import RankError
from autoglm_lab.models.loading import outline
from autoglm_lab.models.tensor_parallel import shares_nbytes

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
PATIENCE = 300


@pytest.fixture(scope="module")
def two() -> Iterator[lab.Workbench]:
    with lab.load("autoglm-tiny", dtype="float32", device="cuda:0", tensor_parallel=2) as workbench:
        yield workbench


def said(wb: lab.Workbench, name: str) -> list[str]:
    turns = [wb.chat("你是谁? " * count, conversation=f"{name} {count}", max_new_tokens=24) for count in (1, 40)]
    return [turn.result(PATIENCE).text for turn in turns]


def test_two_gpus_answer_token_for_token_what_one_answers(two: lab.Workbench) -> None:
    with lab.load("autoglm-tiny", dtype="float32", device="cuda:0") as one:
        expected = said(one, "same")
    assert said(two, "same") == expected


def test_each_gpu_holds_its_share_and_closes_to_its_own_total(two: lab.Workbench) -> None:
    said(two, "held")
    told = shares_nbytes(outline("autoglm-tiny", device="cpu").model, 2)
    for ledger, share in zip(two.ledgers(), told, strict=True):
        assert ledger.nbytes("text") == pytest.approx(share["text"], abs=4 << 20)  # slabs are whole driver pages
        assert sum(row.nbytes or 0 for row in ledger.on("device")) == ledger.total
    first, second = two.ledgers()
    assert second.nbytes("vision") == 0 < first.nbytes("vision")


def test_a_step_that_runs_out_of_memory_on_one_gpu_is_tried_again_on_both(two: lab.Workbench) -> None:
    expected = said(two, "plenty")
    layer, failures = two.model.model.language_model.layers[3], [torch.OutOfMemoryError("no room")]

    def fail(*_: object) -> None:
        if failures:
            raise failures.pop()

    hook = layer.register_forward_pre_hook(fail)
    found = said(two, "scarce")
    hook.remove()
    assert not failures
    assert found == expected


def test_a_gpu_whose_process_is_killed_is_an_error_and_no_hang(two: lab.Workbench) -> None:
    """The last test with these two."""
    ranks = two.engine.state.ranks
    assert ranks is not None
    turn = two.chat("count", conversation="killed", max_new_tokens=2000, eos=False)
    next(iter(turn))
    os.kill(ranks.pids[0], signal.SIGKILL)
    with pytest.raises(RankError, match=r"rank 1 of 2 has ended \(signal 9\)"):
        turn.result(PATIENCE)
