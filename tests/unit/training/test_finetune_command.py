from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from typer.testing import CliRunner

from autoglm_lab.cli import app
from tests.unit.training.conftest import lines


def test_the_command_writes_checkpoints_and_an_adapter_and_names_bad_lines(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    rows = [json.dumps(line) for line in lines(4)]
    data.write_text("\n".join([*rows, "{}"]), encoding="utf-8")
    (tmp_path / "policy.yaml").write_text("training: {micro_batch: 2, accumulation: 1}\n", encoding="utf-8")
    asked = ["finetune", "autoglm-tiny", str(data), "--out", str(out), "--steps", "2", "--rank", "2", "--device", "cpu"]
    policy = ["--policy", str(tmp_path / "policy.yaml"), "--quantize", "nf4"]
    how = ["--target", "o_proj", "--target", "linear_2", "--all-answers", "--schedule", "constant", "--ema", "0.9"]
    how += ["--weight-decay", "0.1"]
    result = CliRunner().invoke(app, [*asked, *policy, *how])
    assert result.exit_code == 0, result.output
    assert "done after 2 steps" in result.output
    assert "left out: line 5: it has no list 'messages'" in result.output
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    learnt = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in learnt} == {"o_proj", "linear_2"}
    assert (out / "checkpoint-2" / "mean.safetensors").is_file()
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 1
    assert "adapter' exists: give another folder with --out" in str(again.exception)
