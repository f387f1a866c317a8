"""A model on a GPU, attached and given back: about 20 MiB of made-up weights."""

from __future__ import annotations

import pytest
import torch

import autoglm_lab as lab
from tests.unit.models.families import audio, grids, vision
from tests.unit.models.families.family import Family

TRIED = ("GLM-4.1V / AutoGLM-Phone (Glm4v)", "LLaVA", "Gemma 4", "Qwen2.5-Omni (thinker)", "Phi-4-multimodal")
FAMILIES = [family for family in (*grids.FAMILIES, *vision.FAMILIES, *audio.FAMILIES) if family.name in TRIED]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_model_is_given_back_on_the_gpu_as_it_was(family: Family) -> None:
    model = family.build().cuda()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(20, 60, device="cuda")[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    wb = lab.attach(model, family.processor(), policy=lab.MemoryPolicy(generation={"max_new_tokens": 4, "eos": False}))
    wb.chat("hello").result(60)
    for name, place in zip(wb.modules, ("host", "disk"), strict=False):
        wb.modules[name].park(place).result()
    assert wb.detach() is model
    for name, tensor in model.state_dict().items():
        assert tensor.is_cuda
        assert torch.equal(tensor, before[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_module_larger_than_what_is_free_is_given_back_by_way_of_the_host() -> None:
    family = next(family for family in FAMILIES if family.name == "LLaVA")
    model = family.build().cuda()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wb = lab.attach(model, family.processor())
    copies, failed = torch.empty_strided, []

    def refuse_once(*args: object, **kwargs: object) -> torch.Tensor:
        if not failed and kwargs.get("device") == torch.device("cuda", 0):
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copies(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_strided", refuse_once)
        wb.detach()
    assert failed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
