"""`Bench`: what a bench works with. One model is loaded when first asked for, and shared by the benches of a run."""

from __future__ import annotations

import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch

from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.errors import LabError
from autoglm_lab.memory.planning.cards import find_card
from autoglm_lab.opening import load
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.workbench import Workbench


def wanted(name: str, words: str | None) -> bool:
    """Whether a name holds one of ``words``, which commas separate; None: every name is wanted."""
    given = [word.strip() for word in (words or "").split(",") if word.strip()]
    return not given or any(word in name for word in given)


def card_or_device(device: torch.device) -> str:
    """The name under which a plan is made for ``device``: its card's where plans know it, else torch's own."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return card if find_card(card) is not None else str(device)


class Bench:
    """The model, the machine, and how large the run is to be.

    Args:
        small: the embedded model and short prompts, whose figures are not judged; None: where there is no GPU. Else
            the shapes of AutoGLM-Phone-9B with made-up weights.
        minutes: how long a soak lasts; None: as many requests as it has.
        soak: seconds of rude clients at the service; None: none of them.
        dialogues: of each task whose answers are counted; None: few in a small run, else 128.
        smollm2: a folder of SmolLM2, for its perplexity; None: without it.
        ranks: devices that compute every layer together, for the bench of that.
        rows: words that the names of the plan's rows hold, commas between them; None: all rows.
        predict_only: the plan's rows are predicted, for an H200 where there is no GPU, and none is measured.
        predicted: what such a run wrote; the plan's rows are compared with it. None: with nothing.
        kept: where each row of the plan's bench is written as soon as it is there, a line of JSON each; None: nowhere.
        command: how this run was started, for the report.
        say: told the progress; standard error by default.

    Raises:
        LabError: a full run without a GPU.
    """

    def __init__(
        self,
        *,
        small: bool | None = None,
        minutes: float | None = None,
        soak: float | None = None,
        dialogues: int | None = None,
        smollm2: Path | None = None,
        ranks: int = 2,
        rows: str | None = None,
        predict_only: bool = False,
        predicted: Path | None = None,
        kept: Path | None = None,
        command: str = "",
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.small = self.device.type == "cpu" and not predict_only if small is None else small
        if not self.small and self.device.type == "cpu" and not predict_only:
            raise LabError("a full run needs a GPU, and torch sees none here: leave --full out")
        self.minutes, self.soak, self.dialogues, self.smollm2 = minutes, soak, dialogues, smollm2
        self.ranks, self.rows, self._kept = ranks, rows, kept
        self.predict_only, self.predicted = predict_only, predicted
        self._command = command
        self._say = say or _to_stderr
        self._started = time.monotonic()
        self._workbench: Workbench | None = None
        self._exact: Workbench | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def workbench(self) -> Workbench:
        """The model under memory control, loaded at the first use, with the default policy."""
        if self._workbench is None:
            name = "autoglm-tiny" if self.small else "autoglm-phone-9b"
            self.say(f"loading {name}")
            self._workbench = load(name, weights=None if self.small else "dummy", device=str(self.device))
        return self._workbench

    @property
    def exact(self) -> Workbench:
        """The embedded model in float32, where equal means equal token for token; the same on a CPU as `workbench`."""
        if self.small and self.workbench.model.dtype == torch.float32:
            return self.workbench
        if self._exact is None:
            self._exact = load("autoglm-tiny", dtype="float32", device=str(self.device))
        return self._exact

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds until ``run`` and what it gave the device are done."""
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def say(self, text: str) -> None:
        """Tell what is under way."""
        self._say(f"[{time.monotonic() - self._started:6.1f} s] {text}")

    def keep(self, entry: dict[str, Any]) -> None:
        """Write what was measured so far to a file of its own, so that it stays when the run is ended."""
        if self._kept is not None:
            with self._kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def wants(self, name: str) -> bool:
        """Whether a row of this name was asked for: it holds one of the words, or no word was given."""
        return wanted(name, self.rows)

    def judge(self, meets: bool) -> bool | None:
        """The verdict of a figure; None in a small run, whose figures say nothing about the bars."""
        return None if self.small else bool(meets)

    def reset(self) -> None:
        """Bring the model back to the default policy, every module on the device, nothing kept."""
        gc.collect()  # a peer's model may still view the weights
        wb = self._workbench
        if wb is not None:
            for conversation in wb.conversations:
                wb.drop(conversation.name)
            wb.policy = MemoryPolicy(kv={"prefix_bytes": 0, "prefix_host_bytes": 0, "encoder_bytes": 0})
            wb.policy = MemoryPolicy()
            for module in wb.modules:
                wb.modules[module].wake().result()
            wb.reclaim()
        if self._exact is not None:
            self._exact.close()
            self._exact = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def report(self, title: str, figures: list[Figure], *notes: str) -> Report:
        """A report of this run."""
        model = "the embedded model" if self.small else "AutoGLM-Phone-9B's shapes, made-up weights"
        return Report(f"{title} ({model})", self.machine(), tuple(figures), notes)

    def machine(self) -> dict[str, str]:
        """Device, driver, versions, date and command."""
        machine = {"device": platform.processor() or platform.machine()}
        if self.cuda:
            machine["device"] = torch.cuda.get_device_name(self.device)
            machine["driver"] = _driver()
        machine["python"] = platform.python_version()
        machine |= {name: _version(name) for name in ("torch", "transformers", "autoglm-lab")}
        machine["date"] = datetime.now(UTC).date().isoformat()
        if self._command:
            machine["command"] = self._command
        return machine

    def close(self) -> None:
        """Free the models."""
        opened = [one for one in (self._workbench, self._exact) if one is not None]
        self._workbench = self._exact = None
        gc.collect()  # a peer's model may still view the weights
        for workbench in opened:
            workbench.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "unknown"
