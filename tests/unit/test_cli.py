from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import autoglm_lab as lab
from autoglm_lab import cli
from autoglm_lab.errors import LoadError

runner = CliRunner()


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from autoglm_lab.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(lab.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_version() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"autoglm-lab {lab.__version__}")


def test_the_help_lists_the_commands() -> None:
    text = runner.invoke(cli.app, ["--help"]).output
    assert all(name in text for name in ("lab", "demo", "bench", "doctor"))


def test_doctor_prints_json() -> None:
    done = command("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["works"] else 1), done.stderr
    assert report["version"] == lab.__version__
    assert report["works"] == all(finding["state"] != "missing" for finding in report["findings"])
    assert {"topic", "name", "state", "found", "advice"} == set(report["findings"][0])


def test_an_error_of_the_package_is_one_line_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise LoadError("no such model: 'x'. There are autoglm-tiny and autoglm-article")

    monkeypatch.setattr("autoglm_lab.doctor.examine", fail)
    monkeypatch.setattr(sys, "argv", ["autoglm-lab", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.err == "autoglm-lab: no such model: 'x'. There are autoglm-tiny and autoglm-article\n"
    assert printed.out == ""


def test_lab_starts_jupyterlab_on_the_workbench_with_what_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jupyterlab")
    started: list[list[str]] = []
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "/elsewhere")
    monkeypatch.setattr(os, "execv", lambda _, arguments: started.append(arguments))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = runner.invoke(cli.app, ["lab", "--no-browser", "--port", "8899"])
    assert result.exit_code == 0, result.output
    assert started[0][:3] == [sys.executable, "-m", "jupyterlab"]
    assert started[0][3].endswith("/notebooks")
    assert started[0][4].endswith("/lab/tree/00_workbench.ipynb")
    assert started[0][-3:] == ["--no-browser", "--port", "8899"]
    ours, rest = os.environ["JUPYTER_CONFIG_PATH"].split(os.pathsep)
    assert (Path(ours) / "labconfig" / "page_config.json").is_file()
    assert rest == "/elsewhere"


def test_lab_as_root_is_allowed_once_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jupyterlab")
    started: list[list[str]] = []
    monkeypatch.delenv("JUPYTER_CONFIG_PATH", raising=False)
    monkeypatch.setattr(os, "execv", lambda _, arguments: started.append(arguments))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    result = runner.invoke(cli.app, ["lab", "--allow-root"])
    assert started[0].count("--allow-root") == 1
    result = runner.invoke(cli.app, ["lab"])
    assert started[1].count("--allow-root") == 1
    assert "running as root" in result.output


def test_lab_without_jupyterlab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["autoglm-lab", "lab"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == 'autoglm-lab: JupyterLab is not installed: pip install "autoglm-lab[lab]"\n'


def test_without_a_checkout_the_notebooks_are_copied_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "autoglm_lab"
    (package / "notebooks").mkdir(parents=True)
    (package / "notebooks" / "00_workbench.ipynb").write_text("{}")
    monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
    monkeypatch.chdir(tmp_path)
    notebook = cli._notebook()
    assert notebook.read_text() == "{}"
    notebook.write_text("mine")
    assert cli._notebook().read_text() == "mine"
