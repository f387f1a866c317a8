from __future__ import annotations

import inspect

import pytest

from autoglm_lab import errors
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_is_a_lab_error_and_stands_in_the_tree_of_the_docstring(cls: type[Exception]) -> None:
    assert issubclass(cls, errors.LabError)
    assert f"{cls.__name__}" in (errors.__doc__ or "")


@pytest.mark.parametrize("cls", [errors.PolicyError, errors.MediaError, errors.MessageError])
def test_errors_about_values_are_value_errors_too(cls: type[Exception]) -> None:
    assert issubclass(cls, ValueError)


def test_a_module_that_is_off_names_the_setting_that_helps() -> None:
    error = errors.ModuleOffError("audio", "the message has a sound")
    assert str(error) == (
        "this request needs the module 'audio' (the message has a sound), which the policy keeps off: "
        "set modules.audio.residency to 'keep' or 'on-demand', "
        "for example wb.policy = wb.policy.replace(modules={'audio': 'on-demand'})"
    )
    assert error.module == "audio"


def test_the_advice_of_a_module_that_is_off_is_a_valid_policy() -> None:
    policy = MemoryPolicy(modules={"audio": "off"}).replace(modules={"audio": "on-demand"})
    assert policy.module("audio").residency == "on-demand"


def test_out_of_memory_says_phase_need_have_and_remedies() -> None:
    error = errors.OutOfMemoryError("prefill", 3 * GiB, GiB, ["kv.max_tokens 4096 frees 1.20 GiB", "park audio"])
    assert str(error) == (
        "out of memory in prefill: needed 3.00 GiB, had 1.00 GiB. "
        "What would help: kv.max_tokens 4096 frees 1.20 GiB; park audio"
    )
    assert (error.phase, error.needed, error.had) == ("prefill", 3 * GiB, GiB)


def test_out_of_memory_without_figures_or_remedies_says_so() -> None:
    text = str(errors.OutOfMemoryError("decode", None, None))
    assert "needed n/a, had n/a" in text
    assert "nothing in the policy would free more" in text
