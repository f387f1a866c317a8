from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.reclaim import Reclaimer
from autoglm_lab.memory.shell import kept_outputs
from autoglm_lab.units import MiB


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables of a session, as IPython has them."""
    variables: dict[str, Any] = {"Out": {}}
    shell = SimpleNamespace(user_ns=variables)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    return variables


def large(mib: int) -> torch.Tensor:
    return torch.zeros(mib * MiB, dtype=torch.uint8)


def test_outputs_that_keep_tensors_alive_are_named_with_their_bytes(space: dict[str, Any]) -> None:
    space["Out"] |= {2: large(3), 3: "text", 5: {"logits": [large(4)]}}
    assert kept_outputs() == "Out[2], Out[5] keep 7.0 MiB of tensors alive: %reset -f out lets them go"


def test_a_tensor_that_several_names_show_counts_once(space: dict[str, Any]) -> None:
    one = large(3)
    space["Out"] |= {2: one, 3: one[:10]}
    space |= {"_": one, "__": one}
    assert kept_outputs() == "Out[2] keeps 3.0 MiB of tensors alive: %reset -f out lets them go"


def test_small_ones_on_the_host_and_other_values_are_passed_over(space: dict[str, Any]) -> None:
    space["Out"] |= {2: torch.zeros(10), 3: torch.empty(MiB, device="meta"), 4: torch.eye(3).to_sparse()}
    assert kept_outputs() == ""


def test_an_output_that_was_cleared_from_out_alone_is_still_named(space: dict[str, Any]) -> None:
    space |= {"_5": large(3), "_i5": large(1), "_private": large(1)}
    assert kept_outputs() == "_5 keeps 3.0 MiB of tensors alive: %reset -f out lets them go"


def test_reclaiming_names_them_and_leaves_them_alone(space: dict[str, Any], accelerator: Accelerator) -> None:
    space["Out"][7] = large(2)
    event = Reclaimer(accelerator).reclaim("asked")
    assert event.why == "asked; Out[7] keeps 2.0 MiB of tensors alive: %reset -f out lets them go"
    assert 7 in space["Out"]


def test_without_ipython_there_is_nothing_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert kept_outputs() == ""
