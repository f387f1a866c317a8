from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoglm_lab.errors import TrainingError
from autoglm_lab.training.course import course_of


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, r"rank must be a whole number, at least 1 \(got 0\)"),
        ({"rank": None}, r"rank must be a whole number, at least 1 \(got None\)"),
        ({"steps": 2.5}, r"steps must be a whole number, at least 1 \(got 2\.5\)"),
        ({"save_every": True}, r"save_every must be a whole number, at least 1 \(got True\)"),
        ({"warm_up": -1}, r"warm_up must be a whole number, at least 0 \(got -1\)"),
        ({"learning_rate": "1e-3"}, r"learning_rate must be a number of more than 0 \(got '1e-3'\)"),
        ({"alpha": float("nan")}, r"alpha must be a number of more than 0 \(got nan\)"),
        ({"weight_decay": -0.1}, r"weight_decay must be a number, at least 0 \(got -0\.1\)"),
        ({"ema": 1.5}, r"ema must be a number of more than 0 and less than 1 \(got 1\.5\)"),
        ({"ema": "0.99"}, r"ema must be a number of more than 0 and less than 1 \(got '0\.99'\)"),
        ({"method": "qlora"}, "there is no method 'qlora': use 'lora' or 'full'"),
        ({"schedule": "linear"}, "there is no schedule 'linear': use 'cosine' or 'constant'"),
        ({"ranks": 3}, "there is no setting 'ranks' of a training; there are method, name, rank"),
        ({"resume": True}, "resume needs the folder that holds the checkpoints: give out="),
    ],
)
def test_settings_that_cannot_be_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        course_of(**setting)


def test_numbers_of_other_libraries_and_lists_are_taken() -> None:
    course = course_of(steps=np.int64(3), learning_rate=np.float32(0.5), targets=["q_proj"], out="runs", ema=None)
    assert (course.steps, course.targets, course.out) == (3, ("q_proj",), Path("runs"))
    assert course.total_steps(dialogues=100, batch=8) == 3
    assert course_of(epochs=2).total_steps(dialogues=100, batch=8) == 26
