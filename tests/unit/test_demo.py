from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoglm_lab import cli, demo


def test_the_demo_answers_three_modalities_rightly_and_gives_memory_back(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    result = CliRunner().invoke(cli.app, ["demo", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "5 of 5 answers right" in result.output
    assert "Memory before parking" in result.output
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["correct"] is True
    assert [answer["kind"] for answer in report["answers"]] == [
        "text", "image", "audio", "image and audio", "image",
    ]  # fmt: skip
    assert report["answers"][1]["text"] == report["answers"][4]["text"], "parking changes no answer"
    sizes = {
        when: {row["name"]: row["nbytes"] for row in ledger["rows"] if row["place"] == "device"}
        for when, ledger in report["ledgers"].items()
    }
    assert sizes["before"]["vision"] > 0
    assert sizes["parked"].get("vision", 0) == sizes["parked"].get("audio", 0) == 0
    assert sizes["woken"]["vision"] == sizes["before"]["vision"]
    assert sizes["woken"].get("audio", 0) == 0
    assert any(event.startswith("woke vision") for event in report["events"])


def test_a_wrong_answer_is_told_and_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = demo.Question("text", "Who are you?", None, None, lambda _: False, "another name")
    monkeypatch.setattr(demo, "questions", lambda: (wrong, wrong))
    result = CliRunner().invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    assert "WRONG, wanted another name" in result.output
    assert "0 of 3 answers right" in result.output


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('do(action="Tap", element=[100,200])', True),
        ('do(action="Tap", element=[121,200])', False),
        ('do(action="Tap", element=[100,200]) or so', False),
        ('finish(message="It is not there")', False),
    ],
)
def test_a_tap_is_right_inside_its_area(text: str, right: bool) -> None:
    assert demo._inside(text, (80, 180, 120, 220)) is right


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["autoglm-lab", "demo", "--json", str(tmp_path / "no" / "file.json")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.endswith("file.json: its folder does not exist\n")
    assert printed.out == ""
