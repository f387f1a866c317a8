"""``%%vram`` in a real IPython shell."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

import autoglm_lab as lab
from autoglm_lab.magic import Holding, changes, without_magic
from autoglm_lab.memory.shell import kept_outputs
from autoglm_lab.units import MiB

HELD = "import torch\nheld = torch.ones(64 * 2**20, dtype=torch.uint8)\n"


@pytest.fixture
def shell() -> Iterator[Any]:
    made: Any = InteractiveShell.instance()
    made.extension_manager.load_extension("autoglm_lab")
    yield made
    made.extension_manager.unload_extension("autoglm_lab")
    made.reset()
    InteractiveShell.clear_instance()


def run(shell: Any, code: str) -> str:
    """Run a cell as a kernel does, and give what it printed."""
    from IPython.utils.capture import capture_output

    with capture_output() as captured:
        asyncio.run(cell(shell, code))
    return str(captured.stdout)


async def cell(shell: Any, code: str) -> None:
    transformed = shell.transform_cell(code)
    result = await shell.run_cell_async(code, transformed_cell=transformed)
    shell.events.trigger("post_execute")
    shell.events.trigger("post_run_cell", result)


def figure(text: str, line: str) -> float:
    """MiB of a line of the report."""
    found = re.search(rf"{line}: \+?(-?[\d.]+) MiB", text)
    assert found, text
    return float(found.group(1))


def test_a_cell_reports_its_peak_and_what_stayed_by_owner(shell: Any, wb: lab.Workbench) -> None:
    text = run(shell, f"%%vram\n{HELD}float(torch.ones(128 * 2**20, dtype=torch.uint8)[0])")
    assert figure(text, "peak over the start of this cell") == pytest.approx(192, abs=16)
    assert figure(text, "stayed") == pytest.approx(64, abs=8)
    assert figure(text, "  unattributed") == pytest.approx(64, abs=8)
    assert not wb.closed


def test_what_a_parked_module_gave_back_is_named(shell: Any, wb: lab.Workbench) -> None:
    shell.user_ns["wb"] = wb
    text = run(shell, "%%vram\nevent = wb.modules['text'].park()")
    assert figure(text, "  text") == pytest.approx(-wb.modules["text"].info.nbytes / MiB, abs=0.1)


def test_a_cell_may_await_and_its_last_value_is_shown(shell: Any) -> None:
    text = run(shell, "%%vram\nimport asyncio\nawait asyncio.sleep(0, result=42)")
    assert "42" in text
    assert "stayed: less than 1 MiB" in text


def test_a_cell_that_fails_is_reported_too(shell: Any) -> None:
    text = run(shell, "%%vram\n1 / 0")
    assert "ZeroDivisionError" in text
    assert "peak over the start of this cell: " in text


def test_other_cells_run_as_they_are(shell: Any) -> None:
    assert run(shell, "print('plain')") == "plain\n"
    lines = ["x = '''\n", "%%vram\n", "'''\n"]
    assert without_magic(lines) is lines


def test_the_line_numbers_of_the_cell_stay() -> None:
    assert without_magic(["%%vram\n", "1 / 0\n"]) == ["\n", "1 / 0\n"]


def test_unloading_takes_it_away(shell: Any) -> None:
    shell.extension_manager.unload_extension("autoglm_lab")
    assert "stayed" not in run(shell, "%%vram\n1")
    shell.extension_manager.load_extension("autoglm_lab")
    shell.extension_manager.reload_extension("autoglm_lab")
    assert run(shell, "%%vram\n1").count("stayed") == 1


def test_what_is_said_of_outputs_is_true(shell: Any) -> None:
    for code in ("import torch", "torch.ones(4 * 2**20, dtype=torch.uint8)"):
        shell.run_cell(code, store_history=True)
    assert kept_outputs() == "Out[2] keeps 4.0 MiB of tensors alive: %reset -f out lets them go"
    shell.run_cell("%reset -f out", store_history=True)
    assert kept_outputs() == ""


def test_changes_add_up_to_what_stayed() -> None:
    before = Holding(1000 * MiB, {"text": 500 * MiB, "KV main": 10 * MiB, "context": 300 * MiB})
    after = Holding(1300 * MiB, {"text": 500 * MiB, "vision": 200 * MiB, "context": 300 * MiB})
    assert changes(before, after) == [("vision", 200 * MiB), ("unattributed", 110 * MiB), ("KV main", -10 * MiB)]


def test_without_a_workbench_the_process_is_measured() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "import autoglm_lab, sys\n"
        "assert 'torch' not in sys.modules\n"
        "autoglm_lab.load_ipython_extension(shell)\n"
        f"shell.run_cell({'%%vram' + chr(10) + HELD!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert figure(done.stdout, "  unattributed") == pytest.approx(64, abs=8), done.stdout


def test_loading_a_workbench_in_the_cell_names_its_modules(tmp_path: object) -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "import autoglm_lab\n"
        "autoglm_lab.load_ipython_extension(shell)\n"
        'shell.run_cell(\'%%vram\\nimport autoglm_lab as lab\\nwb = lab.load("autoglm-tiny", device="cpu")\')\n'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert figure(done.stdout, "  text") > 5, done.stdout
    assert figure(done.stdout, "  context") > 50, done.stdout
