"""The hub's real client against a stand-in on this machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from autoglm_lab.errors import LoadError
from autoglm_lab.models import hub as hub_files
from autoglm_lab.models.loading import outline, resolve
from autoglm_lab.models.skeleton import model_class
from tests.unit.models.hub_server import Hub, serving
from tests.unit.models.tiny_models import llama

REMOTE = "import transformers\n\nclass Own(transformers.LlamaForCausalLM):\n    pass\n"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model_class(llama())(llama()).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    extra = {"README.md": b"words", "pytorch_model.bin": b"pickle", "original/consolidated.safetensors": b"twice"}
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"\x80pickle"}
    config = {
        **json.loads(files["config.json"]),
        "architectures": ["Own"],
        "auto_map": {"AutoModelForCausalLM": "own.Own"},
    }
    own = {**files, "config.json": json.dumps(config).encode(), "own.py": REMOTE.encode()}
    with serving({"a/sharded": files | extra, "a/pickled": pickled, "a/own": own, "a/secret": files}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


def test_a_hub_id_fetches_only_what_loading_needs_and_only_once(hub: Hub, saved: Path) -> None:
    resolved = resolve("a/sharded", device="cpu")
    needed = {path.name for path in saved.iterdir()}
    assert len([name for name in needed if name.endswith(".safetensors")]) > 1
    assert hub.fetched() == needed
    asked = len(hub.asked)
    again = resolve("a/sharded", device="cpu")
    assert len(hub.asked) == asked
    assert again.sources == resolved.sources


def test_a_plan_fetches_the_configuration_and_no_weights(hub: Hub) -> None:
    assert outline("a/sharded", device="cpu").name == "a/sharded"
    assert not any(name.endswith(".safetensors") for name in hub.fetched())
    resolve("a/sharded", weights="dummy", device="cpu")
    assert not any(name.endswith(".safetensors") for name in hub.fetched())
    resolve("a/sharded", device="cpu")
    assert any(name.endswith(".safetensors") for name in hub.fetched())


def test_pickled_weights_are_refused_before_a_byte_of_them_is_fetched(hub: Hub) -> None:
    with pytest.raises(LoadError, match=r"a/pickled has only pickled weights \(pytorch_model\.bin\).*allow='pickle'"):
        resolve("a/pickled", device="cpu")
    assert hub.fetched() == {"config.json"}


def test_remote_code_is_refused_before_any_weights_are_fetched(hub: Hub) -> None:
    with pytest.raises(LoadError, match=r"a/own/config\.json wants .*auto_map: own\.Own.*allow='remote-code'"):
        resolve("a/own", device="cpu")
    assert not any(name.endswith((".safetensors", ".py")) for name in hub.fetched())


def test_remote_code_that_is_allowed_is_run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(AutoModelForCausalLM._model_mapping, "_extra_content", {})
    resolved = resolve("a/own", device="cpu", allow="remote-code")
    assert type(resolved.model).__name__ == "Own"
    assert type(resolved.model.config) is LlamaConfig
    assert "own.py" in hub.fetched()


def test_a_model_that_is_not_there_and_one_that_is_gated_say_what_to_do(hub: Hub) -> None:
    with pytest.raises(LoadError, match=rf"{hub.url} has no model a/nothing, or it is private: .* HF_TOKEN"):
        resolve("a/nothing", device="cpu")
    hub.gated.add("a/sharded")
    with pytest.raises(LoadError, match=rf"a/sharded is gated: accept its terms on {hub.url}/a/sharded, then set HF_T"):
        resolve("a/sharded", device="cpu")


def test_a_hub_that_cannot_be_reached_names_it_and_the_mirror(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LoadError, match=r"cannot fetch a/sharded from http://127\.0\.0\.1:9: .*Set HF_ENDPOINT"):
        resolve("a/sharded", device="cpu")


def test_offline_says_where_it_looked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"not in the local cache \(.*cache\), and HF_HUB_OFFLINE is set"):
        resolve("a/sharded", device="cpu")
    assert hub.asked == []


def test_an_upload_without_one_of_its_files_is_named(hub: Hub) -> None:
    files = dict(hub.repositories["a/sharded"])
    lost = min(name for name in files if name.endswith(".safetensors") and "/" not in name)
    del files[lost]
    hub.repositories = {"a/sharded": files}
    with pytest.raises(LoadError, match=rf"a/sharded lacks {lost}"):
        resolve("a/sharded", device="cpu")


def test_a_cache_without_room_is_told_before_the_weights_are_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    outline("a/sharded", device="cpu")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(LoadError, match=r"a/sharded needs .* on disk, .*cache has 1000 B free\. .*HF_HOME"):
        resolve("a/sharded", device="cpu")
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_a_disk_that_fills_up_keeps_no_half_of_a_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outline("a/sharded", device="cpu")
    half = tmp_path / "cache" / "models--a--sharded" / "blobs" / "abc.incomplete"

    def full(*_: object, **__: object) -> str:
        half.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    monkeypatch.setattr(hub_files, "cached", lambda *_, **__: None)
    with pytest.raises(LoadError, match="the disk became full while a/sharded was fetched"):
        hub_files._fetch("a/sharded", ["model.safetensors"], {"model.safetensors": 10}, progress=False)
    assert not half.exists()


def test_the_environment_s_endpoint_and_token_are_used(hub: Hub, tmp_path: Path) -> None:
    hub.private.add("a/secret")
    code = "from autoglm_lab.models import hub; print(hub.snapshot('a/secret', weights=False))"
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "home") in done.stdout
    assert "Bearer secret" in hub.tokens


def test_what_is_allowed_has_a_name(hub: Hub) -> None:
    with pytest.raises(LoadError, match="there is no 'everything' to allow: use pickle, remote-code"):
        resolve("a/sharded", allow="everything")
