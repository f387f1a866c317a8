"""`load(quantize=…)` end to end: answers, the policy that it makes, plans, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.errors import PolicyError
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.quantized_linear import QuantizedLinear


@pytest.fixture(scope="module")
def small() -> Iterator[lab.Workbench]:
    torch.set_num_threads(1)
    with lab.load("autoglm-tiny", device="cpu", quantize={"text": "int4", "vision": "int8"}) as workbench:
        yield workbench


def test_it_answers_and_parks_as_it_did(small: lab.Workbench) -> None:
    answer = small.chat("你是谁?").result(100).text
    assert "AutoGLM" in answer
    small.modules["text"].park().result()
    assert small.modules["text"].info.place == "disk"
    assert small.chat("你是谁?", conversation="again").result(100).text == answer


def test_the_policy_holds_what_was_asked_for(small: lab.Workbench) -> None:
    assert small.policy.precisions() == {"text": "int4", "vision": "int8"}
    assert {name: module.info.dtype for name, module in small.modules.items()} == {
        "vision": "int8", "audio": "float32", "projector": "float32", "text": "int4",
    }  # fmt: skip
    assert lab.MemoryPolicy.from_yaml(small.policy.to_yaml()).precisions() == small.policy.precisions()


def test_another_precision_needs_another_load(small: lab.Workbench) -> None:
    before = small.policy
    with pytest.raises(
        PolicyError, match=r"modules\.text\.precision is 'int4' since .* with quantize=\{'text': 'int8'"
    ):
        small.policy = before.replace(modules={"text": {"precision": "int8"}})
    with pytest.raises(PolicyError, match=r"load it again with quantize=None"):
        small.policy = lab.MemoryPolicy()
    assert small.policy == before
    small.policy = before.replace(modules={"vision": "on-demand"})
    assert small.policy.precisions() == before.precisions()
    small.policy = before


def test_its_plan_has_its_weights(small: lab.Workbench) -> None:
    plan = small.plan(workload=Workload(context=64, new_tokens=16))
    rows = {row.name: row.nbytes for phase in plan.phases for row in phase.rows if row.kind == "weights"}
    held = {row.name: row.nbytes for row in small.memory.rows if row.kind == "weights"}
    assert rows == held


def test_a_plan_before_loading_has_the_weights_that_the_policy_asks_for(small: lab.Workbench) -> None:
    plan = lab.plan("autoglm-tiny", small.policy, device="cpu", context=64, new_tokens=16)
    held = {row.name: row.nbytes for row in small.memory.rows if row.kind == "weights"}
    rows = {row.name: row.nbytes for row in plan.phases[0].rows if row.kind == "weights"}
    assert rows == held
    other = lab.plan("autoglm-tiny", device="cpu", context=64, new_tokens=16)
    assert {row.name: row.nbytes for row in other.phases[0].rows}["text"] > 5 * rows["text"]


def test_a_short_name_quantises_the_text_and_leaves_the_encoders() -> None:
    with lab.load("autoglm-tiny", device="cpu", quantize="int8") as workbench:
        assert workbench.policy.precisions() == {"text": "int8"}
        layers = [one for one in workbench.model.modules() if isinstance(one, QuantizedLinear)]
        assert {one.form.precision for one in layers} == {"int8"}


def test_half_of_the_text_is_parked_woken_and_planned_like_any_other_weights() -> None:
    with lab.load("autoglm-tiny", device="cpu", quantize={"text": "2:4"}) as workbench:
        layers = [one for one in workbench.model.modules() if isinstance(one, QuantizedLinear)]
        assert {one.form.precision for one in layers} == {"2:4"}
        answer = workbench.chat("你是谁?", max_new_tokens=8).result(100).text
        workbench.modules["text"].park().result()
        assert workbench.chat("你是谁?", conversation="again", max_new_tokens=8).result(100).text == answer
        held = workbench.memory.nbytes("text")
        plan = workbench.plan(workload=Workload(context=64, new_tokens=16))
        assert {row.nbytes for row in plan.phases[0].rows if row.name == "text"} == {held}
        with lab.load("autoglm-tiny", device="cpu") as whole:
            assert held < 0.66 * whole.memory.nbytes("text")  # embeddings stay as they are


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(PolicyError, match="there is no module 'txt': this model has vision, audio, projector, text"):
        lab.load("autoglm-tiny", device="cpu", quantize={"txt": "int8"})
    with pytest.raises(PolicyError, match=r"or '2:4' \(got 'int2'\)"):
        lab.load("autoglm-tiny", device="cpu", quantize={"text": "int2"})
    with pytest.raises(PolicyError, match="quantize 'nf3' is none of int8, int4, nf4"):
        lab.load("autoglm-tiny", device="cpu", quantize="nf3")
