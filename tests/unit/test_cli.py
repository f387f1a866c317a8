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
from autoglm_lab.errors import LabError, LoadError

runner = CliRunner()


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(lab.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "autoglm_lab", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


def test_version() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"autoglm-lab {lab.__version__}")


def test_the_help_lists_the_commands() -> None:
    text = runner.invoke(cli.app, ["--help"]).output
    assert all(name in text for name in ("lab", "demo", "plan", "bench", "doctor"))


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


def test_plan_prints_writes_json_and_exports_a_policy_that_fits(tmp_path: Path) -> None:
    model = ["plan", "autoglm-phone-9b", "--context", "16384"]
    report, policy = tmp_path / "plan.json", tmp_path / "policy.yaml"
    done = runner.invoke(cli.app, [*model, "--budget", "24GiB", "--json", str(report), "--export", str(policy)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("autoglm-phone-9b fits: ")
    data = json.loads(report.read_text())
    assert data["verdict"] == "fits" and data["workload"]["context"] == 16384
    assert lab.MemoryPolicy.from_yaml(policy) == lab.MemoryPolicy(budget="24GiB")
    tight = data["phases"][data["phases"].index(max(data["phases"], key=lambda one: one["needed"]))]["needed"] - 2**28
    done = runner.invoke(cli.app, [*model, "--budget", str(tight), "--export", str(policy)])
    assert done.exit_code == 1
    assert "fits with changes" in done.output and "what would help:" in done.output
    fitting = lab.MemoryPolicy.from_yaml(policy)
    assert lab.plan("autoglm-phone-9b", fitting, context=16384).fits
    again = runner.invoke(cli.app, [*model, "--policy", str(policy)])
    assert again.exit_code == 0, again.output


def test_plan_chooses_a_policy_says_why_and_exports_it(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    arguments = ["--policy", "auto", "--context", "2048", "--conversations", "8", "--export", str(file)]
    done = runner.invoke(cli.app, ["plan", "autoglm-phone-9b", "--budget", "20GiB", *arguments])
    assert done.exit_code == 0, done.output
    assert "Chosen: modules.vision='on-demand'" in done.output
    assert "Nothing that costs less fits: without it" in done.output
    chosen = lab.MemoryPolicy.from_yaml(file)
    assert (chosen.budget, chosen.module("vision").residency) == (20 << 30, "on-demand")

    nothing = runner.invoke(cli.app, ["plan", "autoglm-phone-9b", "--budget", "2GiB", "--policy", "auto"])
    assert nothing.exit_code == 1
    assert "No policy fits 2.00 GiB with 1% to spare: the leanest needs" in nothing.output
    assert "One change would do: rounded weights, quantize='auto' (lossy), or a budget of" in nothing.output


def test_plan_says_what_it_cannot_do(tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        result = runner.invoke(cli.app, ["plan", "autoglm-tiny", *arguments])
        assert isinstance(result.exception, LabError)
        return str(result.exception)

    assert error("--image-size", "big") == "cannot read --image-size 'big': write for example 1080x2400"
    assert error("--policy", "nowhere.yaml") == "there is no file nowhere.yaml: --policy is a file of YAML, or auto"
    assert "its folder does not exist" in error("--json", str(tmp_path / "no" / "plan.json"))
    assert "there is no device or card 'Voodoo'" in error("--device", "Voodoo")
    nothing = tmp_path / "policy.yaml"
    assert "no policy fits" in error("--budget", "100MiB", "--device", "cuda", "--export", str(nothing))
    assert not nothing.exists()
