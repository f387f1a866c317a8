"""The embedded model on the CPU, loaded once for every test that only talks to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import autoglm_lab as lab


@pytest.fixture(scope="session", autouse=True)
def _plans_are_kept_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What plans are compared with does not go to, nor come from, the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoglm_lab.memory.planning.plan_record.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def loaded() -> Iterator[lab.Workbench]:
    torch.set_num_threads(1)
    with lab.load("autoglm-tiny", device="cpu") as workbench:
        yield workbench


@pytest.fixture
def wb(loaded: lab.Workbench) -> Iterator[lab.Workbench]:
    """The workbench as it was loaded: default policy, every module woken, nothing said, no other event told."""
    told = loaded.sampler._events
    first = [event for event in told if event.kind == "loaded"]
    told.clear()
    told.extend(first)
    yield loaded
    loaded.stop()
    loaded.policy = lab.MemoryPolicy()
    for module in loaded.modules.values():
        module.wake()
    for info in loaded.conversations:
        loaded.drop(info.name)
    # What a test leaves in the stores must not be found by the next.
    loaded.policy = lab.MemoryPolicy(kv={"reuse": False, "encoder_bytes": 0})
    loaded.policy = lab.MemoryPolicy()
