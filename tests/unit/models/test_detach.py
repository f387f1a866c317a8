"""A model given back: what stands in the way, and what is as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import autoglm_lab as lab
from autoglm_lab.errors import EngineClosedError, ModuleError
from tests.unit.models.tiny_models import llava


def model() -> Any:
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(llava())


def test_a_view_of_the_weights_refuses_and_the_workbench_goes_on() -> None:
    plain = model()
    wb = lab.attach(plain)
    view = plain.lm_head.weight[:3]
    with pytest.raises(
        ModuleError, match="'head' was not parked: a variable outside the model still views its weights"
    ):
        wb.detach()
    wb.modules["vision"].park()
    assert wb.modules["head"].info.place == "device"
    kept = view.clone()
    del view
    assert wb.detach() is plain
    assert torch.equal(plain.lm_head.weight[:3], kept)
    with pytest.raises(EngineClosedError):
        wb.modules["vision"].park()


def test_a_model_in_training_is_given_back_in_training_with_what_was_written_to_it() -> None:
    plain = model().train()
    plain.model.vision_tower.eval()
    wb = lab.attach(plain)
    assert not plain.training
    with torch.no_grad():
        plain.lm_head.weight[0, 0] = 7.0
    wb.modules["head"].park()
    wb.detach()
    assert plain.training
    assert not plain.model.vision_tower.training
    assert plain.lm_head.weight[0, 0] == 7.0
    plain(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
    assert plain.lm_head.weight.grad is not None


def test_where_the_device_has_no_room_for_both_the_weights_go_by_way_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = model()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    wb = lab.attach(plain)
    held, failed, make = [], [], torch.empty_strided
    residency = wb.engine.state.residency

    def refuse_once(*sizes: Any, **kwargs: Any) -> torch.Tensor:
        if len(failed) == 0:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")
        held.append(residency["vision"]._device.slab.committed)
        return make(*sizes, **kwargs)

    monkeypatch.setattr(torch, "empty_strided", refuse_once)
    wb.detach()
    assert held[0] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_a_loaded_model_can_be_taken_out_of_its_workbench() -> None:
    with lab.load("autoglm-tiny", device="cpu", policy=lab.MemoryPolicy(modules={"audio": "off"})) as wb:
        answer = wb.chat("Who are you?", max_new_tokens=8).result(60).text
        plain = wb.detach()
    assert wb.closed
    batch = wb.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = plain.generate(**batch, do_sample=False, max_new_tokens=8)[0, batch["input_ids"].shape[1] :]
    assert wb.processor.tokenizer.decode(ids).endswith(answer)
    assert not any(tensor.isnan().any() for tensor in plain.state_dict().values() if tensor.is_floating_point())
