"""Files of the Hugging Face hub: those in the local cache, and fetching those that loading needs.

The client's own settings hold: ``HF_TOKEN`` for private and gated models, ``HF_ENDPOINT`` for a mirror, ``HF_HOME`` for
the cache, ``HF_HUB_OFFLINE``. Only configuration, tokenizer and safetensors files are fetched, nothing that runs.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from autoglm_lab.errors import LoadError
from autoglm_lab.models.checkpoint import (
    INDEX,
    PICKLE,
    PICKLE_ENDINGS,
    REMOTE_CODE,
    SINGLE,
    refuse_remote_code,
    refused_pickles,
)
from autoglm_lab.units import format_bytes

_TEXTS = (".json", ".jinja", ".model", ".tiktoken")
_NAMED_TEXTS = ("merges.txt", "vocab.txt")
_SPARE = 64 << 20


def cached(repo_id: str, *, weights: bool = True) -> Path | None:
    """The folder of a model in the local cache; None where it, or a part of what is asked for, is not there.

    Args:
        weights: whether its weights have to be there too.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # The pattern: newer clients check that all that it matches is there, older ones check nothing.
        folder = Path(snapshot_download(repo_id, local_files_only=True, allow_patterns=["config.json"]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() and (not weights or has_weights(folder)) else None


def has_weights(folder: Path) -> bool:
    """Whether every file of safetensors that a folder's index names is there."""
    index = folder / INDEX
    if index.is_file():
        return all((folder / name).is_file() for name in _shards_of(index))
    return any(folder.glob("*.safetensors"))


def snapshot(repo_id: str, *, weights: bool, allow: Collection[str] = (), progress: bool = False) -> Path:
    """The folder of a model, fetched where the local cache lacks it.

    Args:
        weights: False: configuration and tokenizer are enough.
        allow: ``remote-code`` also fetches Python files, ``pickle`` pickled weights where there are no others.
        progress: show how far it is.

    Raises:
        LoadError: no network, no such model, no access, no room, or nothing that may be loaded; the message says which,
            and what to do.
    """
    found = cached(repo_id, weights=weights and PICKLE not in allow)
    if found is not None:
        return found
    sizes = _listing(repo_id)
    texts = [name for name in sizes if name.endswith(_TEXTS) or name in _NAMED_TEXTS]
    if REMOTE_CODE in allow:
        texts += [name for name in sizes if name.endswith(".py")]
    if "config.json" not in sizes:
        raise LoadError(f"{repo_id} has no config.json on {_endpoint()}: it is not a transformers model")
    folder = _fetch(repo_id, texts, sizes, progress=False)
    refuse_remote_code(_read(folder / "config.json"), f"{repo_id}/config.json", allow)
    if not weights:
        return folder
    return _fetch(repo_id, [*texts, *_weights(repo_id, folder, sizes, allow)], sizes, progress=progress)


def _weights(repo_id: str, folder: Path, sizes: Mapping[str, int], allow: Collection[str]) -> list[str]:
    if INDEX in sizes:
        shards = _shards_of(folder / INDEX)
        absent = sorted(shards - set(sizes))
        if absent:
            raise LoadError(f"{repo_id} lacks {absent[0]}, which its {INDEX} names: its upload is not complete")
        return sorted(shards)
    if SINGLE in sizes:
        return [SINGLE]
    safe = [name for name in sizes if name.endswith(".safetensors")]
    if len(safe) == 1:
        return safe
    pickles = sorted(name for name in sizes if name.endswith(PICKLE_ENDINGS))
    if pickles and PICKLE in allow:
        return pickles
    if pickles:
        raise refused_pickles(repo_id, pickles)
    raise LoadError(f"{repo_id} has no {SINGLE} and no {INDEX}: there are no weights to load")


def _listing(repo_id: str) -> dict[str, int]:
    """Files at the top of a repository and their bytes."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise LoadError(
            f"{repo_id} is not in the local cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set, so nothing is "
            f"fetched. Unset it, or fetch it where there is a network (hf download {repo_id}), or give its folder"
        )
    with _explained(repo_id):
        info = HfApi().model_info(repo_id, files_metadata=True)
    files = info.siblings or []
    return {file.rfilename: int(file.size or 0) for file in files if "/" not in file.rfilename}


def _fetch(repo_id: str, names: Collection[str], sizes: Mapping[str, int], *, progress: bool) -> Path:
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    needed = sum(sizes[name] for name in names if not _is_cached(repo_id, name))
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed and free < needed + _SPARE:
        raise LoadError(
            f"{repo_id} needs {format_bytes(needed)} on disk, {cache} has {format_bytes(free)} free. "
            "Make room there, or set HF_HOME to a folder on another disk"
        )
    begun = set(_unfinished(cache, repo_id))
    with _explained(repo_id), _bars(shown=progress):
        try:
            return Path(snapshot_download(repo_id, allow_patterns=list(names)))
        except OSError as error:
            if error.errno == errno.ENOSPC:  # half of a file is no use, and takes the room
                for path in set(_unfinished(cache, repo_id)) - begun:
                    path.unlink(missing_ok=True)
            raise


def _is_cached(repo_id: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo_id, name), str)


def _unfinished(cache: Path, repo_id: str) -> Iterator[Path]:
    return (cache / f"models--{repo_id.replace('/', '--')}").glob("**/*.incomplete")


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """What the client raises, as what a person can do."""
    from huggingface_hub import errors

    where = _endpoint()
    try:
        yield
    except errors.GatedRepoError:
        raise LoadError(
            f"{repo_id} is gated: accept its terms on {where}/{repo_id}, then set HF_TOKEN to a token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise LoadError(
            f"{where} has no model {repo_id}, or it is private: check the name, or set HF_TOKEN to a token that may "
            "read it"
        ) from None
    except Exception as error:  # noqa: BLE001 - what a broken network raises differs between the client's versions
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise LoadError(
                f"the disk became full while {repo_id} was fetched; what was half-written is removed. "
                "Make room, or set HF_HOME to a folder on another disk"
            ) from None
        raise LoadError(f"cannot fetch {repo_id} from {where}: {_reason(error)}. {_OTHERWISE}") from None


_OTHERWISE = "Set HF_ENDPOINT to a mirror that you can reach, or give a folder that has the files"


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextlib.contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """The client's own progress bars, or none."""
    bars: Any = importlib.import_module("huggingface_hub.utils")
    if shown or bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _shards_of(index: Path) -> set[str]:
    weight_map = _read(index).get("weight_map")
    return set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
