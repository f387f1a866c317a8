from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from autoglm_lab import doctor, gpus
from autoglm_lab.units import GiB


class FakeNvml:
    """NVML with two H200s; what it has is what the binding has, with the binding's mistake of tuples for constants."""

    class NVMLError(Exception):
        pass

    nvmlMemory_v2 = 33554472
    NVML_P2P_CAPS_INDEX_READ = (0,)
    NVML_P2P_STATUS_OK = 0
    NVML_FEATURE_ENABLED = 1
    NVML_NVLINK_MAX_LINKS = 36
    NVML_TOPOLOGY_INTERNAL, NVML_TOPOLOGY_SINGLE, NVML_TOPOLOGY_MULTIPLE = 0, 10, 20
    NVML_TOPOLOGY_HOSTBRIDGE, NVML_TOPOLOGY_NODE, NVML_TOPOLOGY_SYSTEM = 30, 40, 50

    def __init__(self, *, nvlink: bool = True, peers: bool = True, hidden: bool = False) -> None:
        self.nvlink, self.peers, self.hidden, self.is_open = nvlink, peers, hidden, False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13010

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
        if version is None:
            return SimpleNamespace(total=140 * GiB, used=2 * GiB)
        return SimpleNamespace(total=140 * GiB, used=GiB, reserved=GiB // 2)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=1, usedGpuMemory=None if self.hidden else GiB)]

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, what: int) -> int:
        assert isinstance(what, int)
        return 0 if (self.nvlink if what == 2 else self.peers) else 1

    def nvmlDeviceGetTopologyCommonAncestor(self, one: int, other: int) -> int:
        return 40

    def nvmlDeviceGetNvLinkState(self, handle: int, lane: int) -> int:
        if lane >= 18:
            raise self.NVMLError("Invalid Argument")
        return 1


def survey(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> gpus.Survey:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    found = gpus.survey()
    assert not nvml.is_open, "NVML is shut down again"
    return found


def test_devices_driver_and_nvlink_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey(monkeypatch, FakeNvml())
    assert (found.driver, found.cuda, found.trouble) == ("580.159.04", "13.1", "")
    assert str(found.devices[1]) == "NVIDIA H200, 140.00 GiB, 1.00 GiB used, driver keeps 512.0 MiB, compute 9.0"
    assert [str(link) for link in found.links] == ["NVLink, 18 links, P2P"]
    assert (found.links[0].first, found.links[0].second) == ("GPU 0", "GPU 1")


@pytest.mark.parametrize(
    ("peers", "text"),
    [(True, "through the CPU, P2P"), (False, "through the CPU, no P2P: copies go through the host")],
)
def test_links_without_nvlink_say_their_path(monkeypatch: pytest.MonkeyPatch, peers: bool, text: str) -> None:
    assert str(survey(monkeypatch, FakeNvml(nvlink=False, peers=peers)).links[0]) == text


def test_hidden_processes_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(hidden=True))  # type: ignore[arg-type]
    report = doctor.examine()
    notes = [finding for finding in report.findings if finding.name == "GPU 0 processes"]
    assert [note.state for note in notes] == ["note"]
    assert "NVML hides the memory of single processes" in str(report)


def test_a_driver_that_fails_later_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()

    def lost(_: int) -> int:
        raise FakeNvml.NVMLError("GPU is lost")

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", lost)
    assert survey(monkeypatch, nvml).trouble == "the driver answers with an error: GPU is lost"


def test_no_binding_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.survey().remedy == "pip install nvidia-ml-py"


def test_this_machine_works() -> None:
    """The tests run here with everything required installed, so doctor has to find it."""
    report = doctor.examine()
    assert report.works, str(report)
    assert {finding.topic for finding in report.findings} >= {"Versions", "Devices", "PyTorch", "Host", "Programs"}
    assert "everything that is needed is here" in str(report)


def test_a_version_that_is_too_old_names_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "4.57.0" if name == "transformers" else installed(name)
    )
    report = doctor.examine()
    finding = next(finding for finding in report.findings if finding.name == "transformers")
    assert finding.state == "missing"
    assert finding.found == "4.57.0, but <6,>=5.23 is needed"
    assert finding.advice.startswith('pip install "transformers')
    assert not report.works
    assert "1 missing: see the lines marked MISS" in str(report)


def test_an_extra_that_lacks_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.importlib.metadata.version

    def version(name: str) -> str:
        if name == "voila":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    report = doctor.examine()
    finding = next(finding for finding in report.findings if finding.name == "voila")
    assert (finding.state, finding.advice) == ("note", 'pip install "autoglm-lab[lab]"')
    assert report.works


def test_doctor_runs_without_torch_and_says_so() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from autoglm_lab.doctor import examine\n"
        "report = examine(); print(report); print(report.works)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MISS  torch" in " ".join(done.stdout.split("  ")) or "cannot be imported" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_the_metadata_of_an_install_names_what_pyproject_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.requirements import Requirement

    in_checkout = doctor._requirements()
    metadata = [text if not extra else f'{text}; extra == "{extra}"' for extra, text in in_checkout]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: metadata)
    monkeypatch.setattr(doctor, "__file__", "/nowhere/autoglm_lab/doctor.py")
    installed = doctor._requirements()
    assert [(extra, str(Requirement(text))) for extra, text in installed] == [
        (extra, str(Requirement(text))) for extra, text in in_checkout
    ]
