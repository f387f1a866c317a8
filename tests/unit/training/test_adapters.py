from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.errors import TrainingError
from autoglm_lab.training.adapters import adapter_summary, write_whole

QUESTION = "What can you do?"


def answer(wb: lab.Workbench, name: str) -> str:
    return str(wb.chat(QUESTION, conversation=name, max_new_tokens=12).result().text)


@pytest.fixture
def adapted(wb: lab.Workbench, tmp_path: Path) -> Path:
    """An adapter that changes what the model says, on the model and in a folder."""
    adapters = wb.tuner._adapters
    wb.engine.occupy(lambda _: adapters.add("default", rank=2, alpha=2)).result()
    generator = torch.Generator().manual_seed(0)
    for weight in adapters.parameters("default").values():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return wb.tuner.save(tmp_path / "adapter")


def test_an_adapter_is_switched_merged_and_removed(wb: lab.Workbench, adapted: Path) -> None:
    changed = answer(wb, "with")
    wb.tuner.switch(on=False)
    plain = answer(wb, "without")
    assert plain != changed
    wb.tuner.switch(on=True)
    assert answer(wb, "with again") == changed
    kept = {name: value.detach().clone() for name, value in wb.model.named_parameters() if ".lora_" not in name}
    wb.tuner.merge()
    assert wb.tuner.adapters == ()
    assert wb.memory.nbytes("adapters") == 0
    assert not any(".lora_" in name for name, _ in wb.model.named_parameters())
    assert answer(wb, "merged") == changed
    # Parking writes what was merged, as any change of the weights.
    wb.modules["text"].park()
    wb.modules["text"].wake()
    assert answer(wb, "woken") == changed
    _restore(wb, kept)
    assert answer(wb, "restored") == plain


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_what_was_saved_is_loaded_here_and_by_peft(wb: lab.Workbench, adapted: Path) -> None:
    changed = answer(wb, "with")
    assert {path.name for path in adapted.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert adapter_summary(adapted)["r"] == 2
    wb.tuner.remove()
    assert answer(wb, "without") != changed
    wb.tuner.load(adapted)
    assert answer(wb, "loaded") == changed

    from peft import PeftModel

    from autoglm_lab.models.autoglm import AutoGlmForConditionalGeneration

    folder = Path(lab.__file__).parent / "models/weights/autoglm-tiny"
    model = AutoGlmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = PeftModel.from_pretrained(model, str(adapted)).eval()
    inputs = wb.processor.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, wb.model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_does_not_hide_what_is_wrong(wb: lab.Workbench, adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="exists: give another folder, or remove it"):
        wb.tuner.save(adapted)
    with pytest.raises(TrainingError, match="there is an adapter 'default' already"):
        wb.tuner.load(adapted)
    wb.tuner.remove()
    with pytest.raises(TrainingError, match="there is no adapter to merge: train one, or load one"):
        wb.tuner.merge()
    with pytest.raises(TrainingError, match=r"holds no adapter: it needs adapter_config\.json and"):
        wb.tuner.load(tmp_path)
    with pytest.raises(TrainingError, match="there is no adapter : there are none"):
        wb.tuner.save(tmp_path / "other")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "one").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "made", half)
    assert not (tmp_path / "made").exists()
    write_whole(tmp_path / "made", lambda folder: (folder / "one").write_text("1"))
    assert (tmp_path / "made" / "one").read_text() == "1"


def _restore(wb: lab.Workbench, kept: dict[str, torch.Tensor]) -> None:
    plain = {name.replace(".base_layer", ""): value for name, value in kept.items()}
    with torch.no_grad():
        for name, parameter in wb.model.named_parameters():
            parameter.copy_(plain[name])
