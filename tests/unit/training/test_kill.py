"""A training that is killed leaves whole checkpoints, from which it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import autoglm_lab as lab
from autoglm_lab.training.dataset import Dataset
from autoglm_lab.training.loop import checkpoints, latest
from tests.unit.training.conftest import lines

# It stands still in the middle of writing its third checkpoint, with some of the files there, and says so.
_SCRIPT = """
import json, sys, time
from pathlib import Path
import autoglm_lab as lab
from autoglm_lab.training import loop

def waits(folder):
    if folder.name == "checkpoint-3":
        (folder / "optimizer.pt").unlink()
        print("writing", flush=True)
        time.sleep(600)

loop.flush = waits
with lab.load("autoglm-tiny", device="cpu") as wb:
    wb.policy = wb.policy.replace(training={"micro_batch": 2, "accumulation": 1})
    data = json.loads(Path(sys.argv[1]).read_text())
    wb.finetune(data, steps=4, save_every=1, out=sys.argv[2], rank=4, alpha=8.0, warm_up=1, seed=1).result()
"""


def test_killed_while_it_writes_a_checkpoint_it_resumes_from_the_one_before(
    wb: lab.Workbench, data: Dataset, tmp_path: Path
) -> None:
    given, out = tmp_path / "data.json", tmp_path / "run"
    given.write_text(json.dumps(lines()))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(given), str(out)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        child.send_signal(signal.SIGKILL)
        child.stdout.close()
        assert child.wait(60) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait(60)

    assert [path.name for path in sorted(out.iterdir())] == [".writing-3", "checkpoint-1", "checkpoint-2"]
    assert latest(out) == out / "checkpoint-2"
    # One that lacks a file is none either, whatever it is called.
    (out / ".writing-3" / "checkpoint-3").rename(out / "checkpoint-3")
    assert latest(out) == out / "checkpoint-2"

    wb.policy = wb.policy.replace(training={"micro_batch": 2, "accumulation": 1})
    run = wb.finetune(data, steps=4, save_every=1, out=out, resume=True, rank=4, alpha=8.0, warm_up=1, seed=1)
    assert run.result(60).steps == 4
    assert [step for step, _ in run.losses] == [3, 4]
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3", "checkpoint-4"]
