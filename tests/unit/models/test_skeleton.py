from __future__ import annotations

import threading
import time

import pytest
import torch

from autoglm_lab.models.loading import outline
from autoglm_lab.models.skeleton import model_class, skeleton


def test_models_built_at_the_same_time_leave_the_default_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = outline("autoglm-tiny", device="cpu").model.config
    cls = model_class(config)
    plain = cls.__init__

    def slow(*given: object, **named: object) -> None:
        time.sleep(0.3)
        plain(*given, **named)

    monkeypatch.setattr(cls, "__init__", slow)
    before = torch.get_default_dtype()
    built = [threading.Thread(target=skeleton, args=(config, dtype)) for dtype in (torch.bfloat16, torch.float16)]
    for thread in built:
        thread.start()
        time.sleep(0.1)
    for thread in built:
        thread.join()
    assert torch.get_default_dtype() == before
