"""What importing the package costs, and which way its imports point."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import autoglm_lab as lab

PACKAGE = Path(lab.__file__).parent
HEAVY = {"torch", "transformers", "plotly", "jupyterlab", "IPython", "ipykernel", "ipywidgets", "anywidget", "pydantic"}

# A name may import from the rows above its own. In the rows that say so, also from its own row.
RANKS: tuple[tuple[set[str], bool], ...] = (
    ({"units", "errors", "policy", "progress", "schedule", "costs", "samples"}, True),
    ({"models"}, True),
    ({"memory"}, True),
    ({"engine"}, True),
    ({"training", "server", "widgets", "figures"}, False),
    ({"modules"}, True),
    ({"engine_bench", "remote_workbench", "workbench"}, True),
    ({"opening", "serving", "spreading"}, True),
    ({"bench"}, True),
    (
        {
            "__main__",
            "cli",
            "demo",
            "doctor",
            "finetune_command",
            "gpus",
            "magic",
            "scale_out_command",
            "serve_command",
        },
        True,
    ),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(("autoglm_lab", *path.relative_to(PACKAGE).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()
KERNELS = {
    "autoglm_lab.engine.norm_kernel",
    "autoglm_lab.memory.kv.paged_triton",
    "autoglm_lab.models.nf4_triton",
    "autoglm_lab.models.quantized_triton",
    "autoglm_lab.models.sparse_triton",
}


def imports(module: str) -> Iterator[str]:
    """The package's modules that a module imports when it runs, wherever in the file the import stands."""
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        # What only a type checker reads is not imported.
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (resolved(alias.name) for alias in node.names if alias.name.startswith("autoglm_lab"))
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + (path.name == "__init__.py")
                home = ".".join([*parts[:keep], *([home] if home else [])])
            if home.split(".")[0] == "autoglm_lab":
                yield from (resolved(f"{home}.{alias.name}") for alias in node.names)


def resolved(name: str) -> str:
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def rank(module: str) -> tuple[int, str]:
    part = module.split(".")[1]
    for number, (names, _) in enumerate(RANKS):
        if part in names:
            return number, part
    pytest.fail(f"autoglm_lab/{part} has no rank: give it one in {Path(__file__).name}")


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"autoglm_lab"}))
def test_imports_point_one_way(module: str) -> None:
    own, part = rank(module)
    for target in imports(module):
        if target == "autoglm_lab":
            # The root knows nothing but the version and the lazy names; only the top may lean on it.
            assert own == len(RANKS) - 1, f"{module} imports the package's root"
            continue
        theirs, other = rank(target)
        among_equals = RANKS[own][1] or part == other
        assert theirs < own or (theirs == own and among_equals), f"{module} may not import {target}"


def test_no_imports_go_in_a_circle() -> None:
    graph = {module: {target for target in imports(module) if target != module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            circle = (*trail[trail.index(module) :], module)
            # A package's own __init__ that gathers the names of its files is not a circle.
            if not any(b.startswith(f"{a}.") for a, b in pairwise(circle)):
                pytest.fail(" -> ".join(circle))
            return
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_the_package_knows_neither_its_tests_nor_its_recipes() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"tests", "recipes"}, module


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, time, json; start = time.perf_counter(); import autoglm_lab; "
        "print(json.dumps([time.perf_counter() - start, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert HEAVY.isdisjoint(runs[0][1])
    # The best of several: others may be using the machine.
    assert min(seconds for seconds, _ in runs) < 0.15


def test_the_benches_are_named_without_torch() -> None:
    code = "import sys; import autoglm_lab.bench, autoglm_lab.bench.command; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_policy_needs_no_torch() -> None:
    code = "import sys; from autoglm_lab import MemoryPolicy, LabError; MemoryPolicy(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", lab.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(lab, name) is not None
    assert name in dir(lab)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'lode'; it has .*Workbench.*load"):
        lab.lode  # noqa: B018


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_imports(module: str) -> None:
    if module in KERNELS and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton comes with torch's CUDA builds alone")
    importlib.import_module(module)
