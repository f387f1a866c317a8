"""What a source is: its configuration, its folder of weights if there is one, and how to get its processor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from autoglm_lab.errors import LoadError
from autoglm_lab.models import catalog, hub
from autoglm_lab.models.checkpoint import ALLOWED, REMOTE_CODE, refuse_remote_code

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Location:
    """What a source is.

    Attributes:
        name: what was asked for, for people.
        folder: of its weights; None: there are none here.
        processor: makes its processor, or None where there is none, and what a person should know about it.
    """

    name: str
    config: PreTrainedConfig
    folder: Path | None
    processor: Callable[[], tuple[Any, tuple[str, ...]]]


def locate(
    source: str | Path | PreTrainedConfig,
    *,
    weights: bool = True,
    allow: Collection[str] = (),
    progress: bool = False,
) -> Location:
    """Find a preset, a folder, a hub id or a configuration.

    Args:
        weights: whether they are wanted: of a hub id that is not in the local cache they are fetched.
        allow: see `loading.resolve`.
        progress: show how far a download is.

    Raises:
        LoadError: there is no such source, it wants to run its own code, or the hub does not give it.
    """
    if isinstance(source, PreTrainedConfig):
        refuse_remote_code(source.to_dict(), type(source).__name__, allow)
        return Location(type(source).__name__.removesuffix("Config"), source, None, _no_processor)
    text = str(source)
    if isinstance(source, str) and source in catalog.names():
        return _preset(catalog.preset(source))
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if isinstance(source, Path) or not _HUB_ID.fullmatch(text):
            raise LoadError(
                f"there is no folder {text!r} and no preset of that name; presets: {', '.join(catalog.names())}"
            )
        folder = hub.snapshot(text, weights=weights, allow=allow, progress=progress)
    return Location(text, _config(folder, allow), folder, lambda: processor_of(folder, allow))


def read_allowed(allow: str | Collection[str]) -> frozenset[str]:
    """What a person allows by name.

    Raises:
        LoadError: there is no such thing to allow.
    """
    names = frozenset([allow] if isinstance(allow, str) else allow)
    unknown = sorted(names - set(ALLOWED))
    if unknown:
        raise LoadError(f"there is no {unknown[0]!r} to allow: use {', '.join(ALLOWED)}")
    return names


def has_processor(folder: Path | None) -> bool:
    """Whether a folder has the files of a processor or a tokenizer."""
    return folder is not None and any((folder / name).is_file() for name in _PROCESSOR_FILES)


def processor_of(folder: Path | None, allow: Collection[str] = ()) -> tuple[Any, tuple[str, ...]]:
    """The processor or tokenizer in a folder; where it cannot be built, None and why."""
    if folder is None or not has_processor(folder):
        return _no_processor()
    from transformers import AutoProcessor

    from autoglm_lab.models.phone_processor import saved_processor

    try:
        found = saved_processor(folder)
        if found is None:
            trust = REMOTE_CODE in allow
            found = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except (ImportError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        return None, (f"the processor of {folder} cannot be built: {reason}",)
    return found, ()


def _preset(preset: catalog.Preset) -> Location:
    config = preset.config()
    if preset.folder is not None or preset.processor_folder is not None:
        return Location(preset.name, config, _with_weights(preset.folder), lambda: (preset.processor(), ()))
    cached = None if preset.repo_id is None else hub.cached(preset.repo_id, weights=False)
    folder, made_up = _with_weights(cached), preset.made_up_processor
    if made_up is not None and not has_processor(cached):
        return Location(preset.name, config, folder, lambda: made_up(config))
    return Location(preset.name, config, folder, lambda: processor_of(cached))


def _with_weights(folder: Path | None) -> Path | None:
    return folder if folder is not None and hub.has_weights(folder) else None


def _no_processor() -> tuple[Any, tuple[str, ...]]:
    return None, ("there is no processor beside these weights: pass token ids and tensors yourself",)


def _config(folder: Path, allow: Collection[str]) -> PreTrainedConfig:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{folder} has no config.json: it is not a transformers model") from None
    except ValueError as error:
        raise LoadError(f"{path} is not JSON: {error}") from None
    refuse_remote_code(settings, str(path), allow)
    trust = REMOTE_CODE in allow
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except (ValueError, KeyError, OSError) as error:
        raise LoadError(f"transformers cannot read {path}: {error}") from None
    assert isinstance(config, PreTrainedConfig)
    if trust and settings.get("auto_map"):
        _register(config, settings["auto_map"], folder)
    return config


def _register(config: PreTrainedConfig, auto_map: dict[str, Any], folder: Path) -> None:
    """Let transformers' Auto classes find the model classes that come with the weights, as a person allowed."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    for auto_name, reference in auto_map.items():
        auto = getattr(transformers, auto_name, None)
        if not auto_name.startswith("AutoModel") or auto is None:
            continue
        try:
            found = get_class_from_dynamic_module(reference, folder, local_files_only=True)
        except (ImportError, OSError, AttributeError, ValueError) as error:
            raise LoadError(f"the code of {folder} ({reference}) cannot be used: {error}") from None
        auto.register(type(config), found, exist_ok=True)
