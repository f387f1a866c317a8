"""`autoglm-lab doctor`: what this machine has, what is too old or missing, and how to get it.

It needs neither a GPU nor torch: whatever cannot be asked is a finding, not a failure.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from autoglm_lab import __version__, gpus
from autoglm_lab.units import GiB, format_bytes

State = Literal["ok", "note", "missing"]

_DISTRIBUTION = "autoglm-lab"
_PURPOSE = {
    "": "the package itself",
    "lab": "the dashboard and the notebooks",
    "serve": "checking OpenAI-compatible endpoints",
    "test": "running the tests",
}
# CUDA's compatibility table: the least Linux driver that runs programs built for a major version.
_LEAST_DRIVER = {12: "525.60.13", 13: "580.65.06"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        topic: the section that it is listed under.
        name: what was looked at.
        state: ``ok``; ``note``: works, with a limit that one should know; ``missing``: something that is needed lacks.
        found: what is there.
        advice: what to do; empty where nothing is to be done.
    """

    topic: str
    name: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, the devices as data, and whether the package can work here."""

    findings: tuple[Finding, ...]
    devices: tuple[gpus.Device, ...]
    links: tuple[gpus.Link, ...]

    @property
    def works(self) -> bool:
        return not any(finding.state == "missing" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "works": self.works,
            "devices": [asdict(device) for device in self.devices],
            "links": [asdict(link) for link in self.links],
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        sign = {"ok": "ok  ", "note": "note", "missing": "MISS"}
        width = max(len(finding.name) for finding in self.findings)
        lines: list[str] = []
        topic = ""
        for finding in self.findings:
            if finding.topic != topic:
                topic = finding.topic
                lines += ["", topic]
            lines.append(f"  {sign[finding.state]}  {finding.name:<{width}}  {finding.found}")
            if finding.advice:
                lines.append(f"        {'':<{width}}-> {finding.advice}")
        missing = sum(finding.state == "missing" for finding in self.findings)
        verdict = "everything that is needed is here" if self.works else f"{missing} missing: see the lines marked MISS"
        return "\n".join([*lines[1:], "", verdict])


def examine() -> Report:
    """Look at everything. Takes some seconds where torch is installed, since torch is imported."""
    survey = gpus.survey()
    findings = (
        _python(),
        *_packages(),
        *_gpu(survey),
        *_torch(survey),
        *_host(),
        *_programs(),
    )
    return Report(findings, survey.devices, survey.links)


def _python() -> Finding:
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding(
            "Versions", "python", "note", here, "only Linux is tested; memory figures may be missing elsewhere"
        )
    return Finding("Versions", "python", "ok", here)


def _packages() -> Iterator[Finding]:
    """What the distribution asks for against what is installed."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("Versions", "packaging", "missing", "not installed", "pip install packaging")
        return
    yield Finding("Versions", _DISTRIBUTION, "ok", __version__)
    for extra, text in _requirements():
        requirement = Requirement(text)
        yield _package(requirement.name, requirement.specifier, extra)


def _requirements() -> list[tuple[str, str]]:
    """(extra, requirement) pairs: by pyproject.toml in a checkout, else by the metadata of what is installed."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.exists():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        extras = {"": table["dependencies"], **table["optional-dependencies"]}
        return [(extra, text) for extra, texts in extras.items() for text in texts]
    pairs = []
    for text in importlib.metadata.requires(_DISTRIBUTION) or []:
        requirement, _, marker = text.partition(";")
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        pairs.append((extra[1] if extra else "", requirement.strip()))
    return pairs


def _package(name: str, least: Any, extra: str) -> Finding:
    topic = f"Versions: {extra} ({_PURPOSE.get(extra, extra)})" if extra else "Versions"
    how = f'pip install "{_DISTRIBUTION}[{extra}]"' if extra else f'pip install "{name}{least}"'
    # An extra is a choice: to lack it is worth a note, not a failure.
    lacking: State = "note" if extra else "missing"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(topic, name, lacking, f"not installed ({least} needed)", how)
    if not least.contains(found, prereleases=True):
        return Finding(topic, name, lacking, f"{found}, but {least} is needed", how)
    return Finding(topic, name, "ok", f"{found} ({least})")


def _gpu(survey: gpus.Survey) -> Iterator[Finding]:
    if survey.trouble:
        yield Finding("Devices", "NVML", "note", survey.trouble, survey.remedy)
    else:
        yield Finding("Devices", "NVML", "ok", f"driver {survey.driver}, CUDA up to {survey.cuda}")
    for device in survey.devices:
        yield Finding("Devices", f"GPU {device.index}", "ok", str(device))
        if not device.sees_processes:
            yield Finding(
                "Devices",
                f"GPU {device.index} processes",
                "note",
                "NVML hides the memory of single processes (usual in containers)",
                "the ledger then counts this process by its allocator and says so; docker run --pid=host shows it",
            )
    for link in survey.links:
        yield Finding("Devices", f"{link.first} <-> {link.second}", "ok" if link.peer_access else "note", str(link))


def _torch(survey: gpus.Survey) -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        yield Finding("PyTorch", "torch", "missing", "cannot be imported", 'pip install "torch>=2.11"')
        return
    except OSError as error:
        yield Finding(
            "PyTorch", "torch", "missing", f"cannot be loaded: {error}", "install a build that fits this machine"
        )
        return
    built = torch.version.cuda
    build = "CPU" if built is None else f"CUDA {built}"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Finding("PyTorch", "device", "ok", f"CUDA {built}: {names}")
    elif not survey.devices:
        yield Finding(
            "PyTorch",
            "device",
            "note",
            f"no GPU: the host is the device ({build} build)",
            "everything runs; parking goes to disk and frees RAM, speed is the CPU's",
        )
    elif built is None:
        yield Finding(
            "PyTorch",
            "device",
            "note",
            f"there is a GPU, but torch {torch.__version__} is a CPU build",
            "install a CUDA build of torch, then this package again",
        )
    else:
        least = _LEAST_DRIVER.get(int(built.split(".")[0]), "a newer one")
        yield Finding(
            "PyTorch",
            "device",
            "note",
            f"torch, a {build} build, does not see the GPU (driver {survey.driver})",
            f"driver {least} or newer is needed for CUDA {built.split('.')[0]}; check CUDA_VISIBLE_DEVICES too",
        )
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if settings:
        yield Finding("PyTorch", "allocator", "ok", settings)


def _host() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("Host", "cores", "ok", str(cores))
    memory = _memory()
    if memory is not None:
        yield memory
    free = shutil.disk_usage(tempfile.gettempdir()).free
    enough = free >= 4 * GiB
    yield Finding(
        "Host",
        "temporary folder",
        "ok" if enough else "note",
        f"{tempfile.gettempdir()}: {format_bytes(free)} free",
        "" if enough else "dummy weights go there when they are parked; TMPDIR names another folder",
    )


def _memory() -> Finding | None:
    try:
        import psutil
    except ImportError:
        return None
    memory = psutil.virtual_memory()
    return Finding("Host", "memory", "ok", f"{format_bytes(memory.total)}, {format_bytes(memory.available)} available")


def _programs() -> Iterator[Finding]:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            yield Finding("Programs", "chromium", "ok", path)
            return
    yield Finding(
        "Programs", "chromium", "note", "not installed: only the browser tests need it", "apt-get install chromium"
    )
