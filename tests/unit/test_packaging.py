"""The files around the code agree with one another."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import autoglm_lab as lab
from autoglm_lab.policy import GenerationPolicy, KvPolicy, ModulePolicy, ReclaimPolicy

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
# conda's names for what PyPI calls otherwise.
CONDA_NAMES = {"pytorch": "torch", "soxr-python": "soxr"}


def required() -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, texts)}


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def conda() -> dict[str, Requirement]:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    entries = environment["dependencies"]
    texts = [entry for entry in entries if isinstance(entry, str)]
    texts += [text for entry in entries if isinstance(entry, dict) for text in entry["pip"]]
    found = [Requirement(text) for text in texts if not text.startswith("--editable") and text != "pip"]
    return {
        CONDA_NAMES.get(requirement.name, canonicalize_name(requirement.name)): requirement for requirement in found
    }


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_conda_asks_for_what_pyproject_asks_for() -> None:
    environment = conda()
    assert str(environment.pop("python").specifier) == PROJECT["requires-python"]
    assert {name: str(requirement.specifier) for name, requirement in environment.items()} == {
        name: str(requirement.specifier) for name, requirement in required().items()
    }


def test_the_conda_file_says_that_it_is_not_executed() -> None:
    assert "Not executed in CI" in (ROOT / "environment.yml").read_text(encoding="utf-8")


def test_every_requirement_is_pinned_within_its_range() -> None:
    versions = pinned()
    for name, requirement in required().items():
        assert name in versions, f"{name} is not in constraints.txt"
        assert versions[name] in requirement.specifier, f"{name} {versions[name]} is outside {requirement.specifier}"


def test_torch_is_pinned_for_any_build() -> None:
    assert pinned()["torch"].local is None


def test_every_package_that_the_code_imports_is_required() -> None:
    import sys

    known = {
        "yaml": "pyyaml",
        "PIL": "pillow",
        "pynvml": "nvidia-ml-py",
        "IPython": "ipykernel",
        "traitlets": "ipywidgets",
    }
    transitive = {"tokenizers": "transformers", "huggingface_hub": "transformers", "triton": "torch"}
    names: set[str] = set()
    for path in Path(lab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").split(".")[0])
    names -= {*sys.stdlib_module_names, "autoglm_lab"}
    wanted = {canonicalize_name(known.get(name, transitive.get(name, name))) for name in names}
    assert wanted <= set(required())


def test_the_version_is_in_the_changelog() -> None:
    assert f"## {lab.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_the_whole_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_commands_of_the_readme_exist(readme: Path) -> None:
    targets = set(re.findall(r"\bmake ([a-z]+)", readme.read_text(encoding="utf-8")))
    assert {"lab", "test", "demo"} <= targets <= make_targets()


def test_the_design_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", "".join(table)):
        assert (ROOT / "autoglm_lab" / name).exists(), name
    folders = {path.parent.name for path in (ROOT / "autoglm_lab").glob("*/__init__.py")}
    assert folders <= {name.rstrip("/") for name in re.findall(r"`([a-z_]+/)`", text)}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_links_of_the_readme_lead_somewhere(readme: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", readme.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_python_of_the_readme_is_python(readme: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, readme.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_settings_of_the_readme_exist(readme: Path) -> None:
    parts = {"modules": ModulePolicy, "kv": KvPolicy, "reclaim": ReclaimPolicy, "generation": GenerationPolicy}
    named = re.findall(
        r"`(modules|kv|reclaim|generation)\.(?:<name>\.)?([a-z_]+|\*)`", readme.read_text(encoding="utf-8")
    )
    assert {part for part, _ in named} == set(parts)
    for part, setting in named:
        assert setting == "*" or setting in parts[part].model_fields, f"{part}.{setting}"


def test_the_size_of_the_embedded_model_is_what_the_readme_says() -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from autoglm_lab.models.catalog import preset

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(preset("autoglm-tiny").config())
    millions = f"{model.num_parameters() / 1e6:.1f}"
    assert f"{millions} million parameters" in READMES[0].read_text(encoding="utf-8")
    assert f"{float(millions) * 100:.0f} 万参数" in READMES[1].read_text(encoding="utf-8")


def test_both_readmes_show_the_same_code() -> None:
    english, chinese = (
        re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL) for path in READMES
    )
    without_comments = [[re.sub(r"\s*#.*", "", block) for block in blocks] for blocks in (english, chinese)]
    assert without_comments[0] == without_comments[1]


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_committed_without_outputs_of_one_machine(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    outputs = json.dumps([cell.get("outputs", []) for cell in content["cells"]])
    assert not re.search(r"/(home|root|work|tmp)/", outputs)


def test_the_commands_of_the_makefile_are_dry_runnable() -> None:
    environment = {**os.environ, "MAKEFLAGS": ""}
    for target in ("lab", "demo", "doctor", "test"):
        done = subprocess.run(
            ["make", "--dry-run", target, "VENV=.make/none"],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        assert "-m venv .make/none" in done.stdout, f"make {target} makes its own environment"
        assert "--constraint constraints.txt" in done.stdout


def test_make_says_which_python_is_missing() -> None:
    done = subprocess.run(
        ["make", "venv", "VENV=.make/none", "PYTHON=python-that-is-not-there"],
        check=False, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""},
    )  # fmt: skip
    assert done.returncode != 0
    assert "There is no 'python-that-is-not-there': install Python >= 3.11" in done.stdout


def test_the_ci_script_is_executable_and_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")
