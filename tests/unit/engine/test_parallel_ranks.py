"""A model that two processes hold: it answers as one does, and what one of them cannot do is an answer, not a hang."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import autoglm_lab as lab
from autoglm_lab.engine.parallel import link as say
from autoglm_lab.engine.parallel.limits import refuse_apart
from autoglm_lab.errors import EngineClosedError, LabError, PolicyError, RankError
from autoglm_lab.models.loading import outline
from autoglm_lab.models.tensor_parallel import shares_nbytes
from autoglm_lab.workbench import Workbench

PATIENCE = 300  # seconds after which a test gives up, on the slowest machine


def load(**options: object) -> Workbench:
    return lab.load("autoglm-tiny", device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def two() -> Iterator[Workbench]:
    with load(tensor_parallel=2) as workbench:
        yield workbench


def answers(wb: Workbench, name: str) -> list[str]:
    """A long prompt in several chunks, an image, and two conversations that decode together."""
    red = Image.new("RGB", (224, 224), (255, 0, 0))
    asked = [
        wb.chat("你是谁? " * 30, conversation=f"{name} 1", max_new_tokens=12, seed=0),
        wb.chat("What colour is this?", image=red, conversation=f"{name} 2", max_new_tokens=12),
    ]
    found = [turn.result(PATIENCE).text for turn in asked]
    return [*found, wb.chat("And now?", conversation=f"{name} 1", max_new_tokens=12).result(PATIENCE).text]


def test_two_ranks_answer_token_for_token_what_one_process_answers(two: Workbench) -> None:
    policy = lab.MemoryPolicy(kv={"chunk": 64})
    with load(policy=policy) as one:
        expected = answers(one, "same")
    before = two.policy
    two.policy = before.replace(kv={"chunk": 64})
    assert answers(two, "same") == expected
    two.policy = before


def test_each_rank_has_a_ledger_with_its_half_of_the_text(two: Workbench) -> None:
    two.chat("hello", conversation="ledger", max_new_tokens=2).result(PATIENCE)
    first, second = two.ledgers()
    assert "rank 1" in second.device
    assert first.nbytes("vision") > 0
    assert second.nbytes("vision") == 0
    told = shares_nbytes(outline("autoglm-tiny", device="cpu").model, 2)
    assert first.nbytes("text") == second.nbytes("text") == pytest.approx(told[1]["text"], rel=0.01)
    held = sum(row.nbytes or 0 for row in first.on("device") if row.kind == "kv")
    assert second.nbytes("KV pages") >= held > 0


def test_a_module_is_parked_on_every_rank_and_comes_back_with_the_next_turn(two: Workbench) -> None:
    said = two.chat("你是谁?", conversation="before", max_new_tokens=8).result(PATIENCE).text
    two.modules["text"].park().result()
    parked = [ledger.nbytes("text") for ledger in two.ledgers()]
    # What rank 0 says is done in order, and its question for a ledger is answered at once: so ask again after a step.
    assert parked[0] == 0
    assert two.chat("你是谁?", conversation="after", max_new_tokens=8).result(PATIENCE).text == said
    assert all(ledger.nbytes("text") > 0 for ledger in two.ledgers())


def test_a_step_that_runs_out_of_memory_on_one_rank_is_tried_again_on_all(two: Workbench) -> None:
    said = two.chat("你是谁?", conversation="plenty", max_new_tokens=8).result(PATIENCE).text
    layer, failures = two.model.model.language_model.layers[3], [torch.OutOfMemoryError("no room")]

    def fail(*_: object) -> None:
        if failures:
            raise failures.pop()

    hook = layer.register_forward_pre_hook(fail)
    answer = two.chat("你是谁?", conversation="scarce", max_new_tokens=8).result(PATIENCE)
    hook.remove()
    assert not failures
    assert answer.text == said


def test_a_rank_that_fails_fails_the_step_and_not_the_next_one(two: Workbench) -> None:
    ranks = two.engine.state.ranks
    assert ranks is not None
    ranks.copied(-(1 << 40), 0)  # no such page
    with pytest.raises(RankError, match="rank 1 failed in a step"):
        two.chat("你是谁?", conversation="failing", max_new_tokens=4).result(PATIENCE)
    assert two.chat("你是谁?", conversation="failing", max_new_tokens=4).result(PATIENCE).text


def test_what_ranks_cannot_do_is_said_before_it_is_tried(two: Workbench) -> None:
    with pytest.raises(PolicyError, match=r"kv\.precision is 'model' on every rank since this model was loaded"):
        two.policy = two.policy.replace(kv={"precision": "int8"})
    with pytest.raises(LabError, match="load it without tensor_parallel"):
        two.tuner  # noqa: B018
    with pytest.raises(LabError, match="load it without tensor_parallel"):
        two.detach()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"placement": {"host_bytes": "1MiB"}},
            r"placement\.host_bytes is .*but ranks keep their layers on their devices",
        ),
        ({"kv": {"place": "host"}}, r"kv\.place is 'host', but ranks keep their pages on their devices"),
        ({"kv": {"overflow": "evict"}}, r"kv\.overflow is 'evict', which asks all heads"),
    ],
)
def test_a_policy_that_ranks_cannot_obey_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        refuse_apart(lab.MemoryPolicy(**settings))
    refuse_apart(lab.MemoryPolicy())


def test_a_rank_that_is_killed_is_an_error_at_once_and_at_every_turn_after_it(two: Workbench) -> None:
    """The last test with these two ranks."""
    ranks = two.engine.state.ranks
    assert ranks is not None
    turn = two.chat("count", conversation="killed", max_new_tokens=2000, eos=False)
    next(iter(turn))
    os.kill(ranks.pids[0], signal.SIGKILL)
    with pytest.raises(RankError, match=r"rank 1 of 2 has ended \(signal 9\).*Load the model again"):
        turn.result(PATIENCE)
    with pytest.raises(RankError, match="rank 1 of 2 has ended"):
        two.chat("again", conversation="later").result(PATIENCE)
    assert len(two.ledgers()) == 1
    two.close()
    with pytest.raises(EngineClosedError):
        two.chat("closed")


def test_a_rank_ends_by_itself_when_rank_0_is_gone(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    meeting = tmp_path / "ranks" / "meeting"
    meeting.parent.mkdir()
    model = {"source": "autoglm-tiny", "weights": None, "dtype": "float32", "seed": 0, "allow": ()}
    with theirs:
        command = [sys.executable, "-m", "autoglm_lab.engine.parallel.follower", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    link = say.Link(ours.detach())
    link.send(say.Start(model, lab.MemoryPolicy().model_dump_json(), "cpu", 1, 2, meeting, 1))
    assert isinstance(link.receive(), say.Ready)
    link.close()  # as the system does it for a process that was killed
    assert process.wait(PATIENCE) is not None
    assert not meeting.parent.exists()
