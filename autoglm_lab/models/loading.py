"""From a preset, a folder, a hub id or a configuration to a model whose weights are still elsewhere.

`resolve` reads configurations and file headers only: the model that comes out has its parameters on the meta device,
its computed buffers real, and beside it where the bytes of each tensor are. `memory/` materialises them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from autoglm_lab.errors import LoadError
from autoglm_lab.models import checkpoint
from autoglm_lab.models.anatomy import named_tensors
from autoglm_lab.models.checkpoint import FileTensor, refuse_remote_code
from autoglm_lab.models.skeleton import model_class, skeleton

_STORED_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DummyTensor:
    """A tensor that is made up: equal for equal seeds, on every device.

    Attributes:
        fill: ``normal`` around 0 with ``std``, ``ones`` or ``zeros``.
        seed: of this tensor alone.
    """

    fill: Literal["normal", "ones", "zeros"]
    std: float
    seed: int


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that this process already holds."""

    tensor: Tensor


Source = FileTensor | DummyTensor | HeldTensor


@dataclass(frozen=True)
class _Located:
    """What a source is: its configuration, its folder of weights if there is one, and how to get its processor."""

    name: str
    config: PreTrainedConfig
    folder: Path | None
    processor: Callable[[], tuple[Any, tuple[str, ...]]]


@dataclass
class Resolved:
    """A model to be materialised.

    Attributes:
        name: what was asked for, for people.
        model: the model; its parameters are on the meta device, or hold what was attached.
        sources: where each tensor of `anatomy.named_tensors` comes from.
        processor: the model's processor or tokenizer, None where there is none.
        dtype: of the floating-point parameters.
        device: where the model is to run.
        notes: what a person should know, one sentence each.
        attached: whether the process held the model already, before anyone measured.
    """

    name: str
    config: PreTrainedConfig
    model: PreTrainedModel
    sources: dict[str, Source]
    processor: Any
    generation_config: GenerationConfig | None
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...] = ()
    attached: bool = False


def resolve(
    source: str | Path | PreTrainedConfig,
    *,
    weights: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Resolved:
    """Find out what ``source`` is and where its bytes are; no weight is read.

    Args:
        source: a preset (``autoglm-tiny``), a folder of safetensors, a hub id whose files are in the local cache, or
            a configuration object (which needs ``weights="dummy"`` or a folder).
        weights: None: those of ``source``; ``"dummy"``: made up; a folder: those there.
        dtype: ``auto``: float32 on CPU, the file's on a GPU; or ``float32``, ``bfloat16``, ``float16``.
        device: None: ``cuda:0`` if there is one, else ``cpu``.
        seed: of dummy weights.

    Raises:
        LoadError: unknown source, pickled weights, remote code, a corrupt file, missing or unexpected tensors.
    """
    import autoglm_lab.models.autoglm  # noqa: F401 - registers the architecture with transformers' Auto classes

    place = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    located = _locate(source)
    config, folder = located.config, located.folder
    if weights == "dummy":
        folder = None
    elif weights is not None:
        folder = Path(weights)
        if not folder.is_dir():
            raise LoadError(f"there is no folder {str(weights)!r}: weights are 'dummy', or a folder of safetensors")
    elif folder is None:
        raise LoadError(
            f"{located.name} has no weights here: pass weights='dummy' for made-up ones, or a folder of safetensors"
        )
    files = {} if folder is None else checkpoint.read_folder(folder)
    chosen = _dtype(dtype, place, files, config)
    model = skeleton(config, chosen)
    # Weights from elsewhere bring the processor that belongs to them.
    own = folder is not None and folder != located.folder and _has_processor(folder)
    processor, notes = _processor(folder) if own else located.processor()
    if folder is None:
        sources, found = _dummy_sources(model, config, seed), model
        notes += ("the weights are made up: answers are noise, memory and speed are true",)
    else:
        sources, found = _file_sources(model, files, folder, chosen)
    generation = _generation_config(located.folder or folder)
    if generation is not None and found.can_generate():
        found.generation_config = generation
    found.eval()
    current = getattr(found, "generation_config", None)
    return Resolved(located.name, found.config, found, sources, processor, current, chosen, place, notes)


@dataclass(frozen=True)
class Outline:
    """What a model is, without its weights.

    Attributes:
        name: what was asked for, for people.
        model: its parameters are on the meta device.
        dtype: of the floating-point parameters.
        processor: makes the model's processor or tokenizer; None where there is none.
    """

    name: str
    model: PreTrainedModel
    dtype: torch.dtype
    processor: Callable[[], Any]


def outline(source: str | Path | PreTrainedConfig, *, device: str = "cuda") -> Outline:
    """Find out what ``source`` is, as `resolve` does, from configurations and the headers of files alone.

    Args:
        source: as for `resolve`; a hub id that a preset knows needs no files.
        device: ``cuda`` or ``cpu``: decides the dtype.

    Raises:
        LoadError: unknown source, remote code, a corrupt file.
    """
    import autoglm_lab.models.autoglm  # noqa: F401 - registers the architecture with transformers' Auto classes
    from autoglm_lab.models import catalog

    known = {preset.repo_id: preset.name for preset in catalog.presets() if preset.repo_id is not None}
    if isinstance(source, str) and source in known and _cached(source) is None:
        source = known[source]
    located = _locate(source)
    files = {} if located.folder is None else checkpoint.read_folder(located.folder)
    dtype = _dtype("auto", torch.device(device), files, located.config)
    return Outline(located.name, skeleton(located.config, dtype), dtype, lambda: located.processor()[0])


def adopt(model: PreTrainedModel, processor: Any = None, *, device: str | torch.device | None = None) -> Resolved:
    """A model that this process already holds, as `resolve` would give it.

    Raises:
        LoadError: some of its parameters are on the meta device.
    """
    tensors = dict(named_tensors(model))
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise LoadError(
            f"{len(empty)} parameters have no values (meta device), for example {empty[0]}: load them first"
        )
    first = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), torch.empty(0))
    return Resolved(
        name=type(model).__name__,
        config=model.config,
        model=model,
        sources={name: HeldTensor(tensor.detach()) for name, tensor in tensors.items()},
        processor=processor,
        generation_config=getattr(model, "generation_config", None),
        dtype=first.dtype,
        device=torch.device(device or first.device),
        attached=True,
    )


def _locate(source: str | Path | PreTrainedConfig) -> _Located:
    if isinstance(source, PreTrainedConfig):
        refuse_remote_code(source.to_dict(), type(source).__name__)
        return _Located(type(source).__name__.removesuffix("Config"), source, None, _no_processor)
    from autoglm_lab.models import catalog

    text = str(source)
    if isinstance(source, str) and source in catalog.names():
        preset = catalog.preset(source)
        if preset.folder is not None or preset.processor_folder is not None:
            return _Located(source, preset.config(), _with_weights(preset.folder), lambda: (preset.processor(), ()))
        cached = None if preset.repo_id is None else _cached(preset.repo_id)
        config, made_up = preset.config(), preset.made_up_processor
        if made_up is not None and not _has_processor(cached):
            return _Located(source, config, _with_weights(cached), lambda: made_up(config))
        return _Located(source, config, _with_weights(cached), lambda: _processor(cached))
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            raise LoadError(
                f"there is no folder {text!r} and no preset of that name; presets: {_listed(catalog.names())}"
            )
        cached = _cached(text)
        if cached is None:
            raise LoadError(
                f"{text} is not in the local Hugging Face cache, and nothing is fetched here. "
                f"Fetch it (hf download {text}) or give its folder; presets: {_listed(catalog.names())}"
            )
        folder = cached
    return _Located(text, _config(folder), folder, lambda: _processor(folder))


def _with_weights(folder: Path | None) -> Path | None:
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _listed(names: Any) -> str:
    return ", ".join(names)


def _cached(repo_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{folder} has no config.json: it is not a transformers model") from None
    except ValueError as error:
        raise LoadError(f"{path} is not JSON: {error}") from None
    refuse_remote_code(settings, str(folder))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise LoadError(f"transformers cannot read {path}: {error}") from None
    assert isinstance(config, PreTrainedConfig)
    return config


def _dtype(
    asked: str | torch.dtype, device: torch.device, files: dict[str, FileTensor], config: PreTrainedConfig
) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    if asked in _STORED_NAMES:
        return _STORED_NAMES[asked]
    if asked != "auto":
        raise LoadError(f"there is no dtype {asked!r}: use auto, {_listed(_STORED_NAMES)}")
    if device.type == "cpu":
        return torch.float32
    by_dtype: dict[torch.dtype, int] = {}
    for tensor in files.values():
        if tensor.dtype.is_floating_point:
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.nbytes
    if by_dtype:
        return max(by_dtype, key=lambda dtype: by_dtype[dtype])
    stated = getattr(config, "dtype", None)
    return stated if isinstance(stated, torch.dtype) and stated != torch.float32 else torch.bfloat16


def _no_processor() -> tuple[Any, tuple[str, ...]]:
    return None, ("there is no processor beside these weights: pass token ids and tensors yourself",)


def _has_processor(folder: Path | None) -> bool:
    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
    return folder is not None and any((folder / name).is_file() for name in names)


def _processor(folder: Path | None) -> tuple[Any, tuple[str, ...]]:
    if not _has_processor(folder):
        return _no_processor()
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False), ()
    except (ImportError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        return None, (f"the processor of {folder} cannot be built: {reason}",)


def _generation_config(folder: Path | None) -> GenerationConfig | None:
    if folder is None or not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise LoadError(f"{folder / 'generation_config.json'} cannot be read: {error}") from None


def _dummy_sources(model: PreTrainedModel, config: PreTrainedConfig, seed: int) -> dict[str, Source]:
    std = float(getattr(config.get_text_config(), "initializer_range", 0.02) or 0.02)
    sources: dict[str, Source] = {}
    for index, (name, tensor) in enumerate(named_tensors(model)):
        if not tensor.is_meta:  # a buffer: its computed value is the true one
            sources[name] = HeldTensor(tensor)
            continue
        last = name.rsplit(".", 1)[-1]
        fill: Literal["normal", "ones", "zeros"] = "normal"
        if last.endswith("bias"):
            fill = "zeros"
        elif tensor.ndim == 1 and last.endswith("weight"):
            fill = "ones"
        sources[name] = DummyTensor(fill, std, seed * 1_000_003 + index)
    return sources


def _file_sources(
    model: PreTrainedModel, files: dict[str, FileTensor], folder: Path, dtype: torch.dtype
) -> tuple[dict[str, Source], PreTrainedModel]:
    """Tensors by the model's names; the model is another one where only transformers could convert the names."""
    named = _renamed(model, files)
    sources: dict[str, Source] = {}
    aliases = _aliases(model)
    used: set[str] = set()
    missing, misshapen = [], []
    ignored_missing = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    for name, tensor in named_tensors(model):
        spellings = [alias for alias in aliases.get(id(tensor), [name]) if alias in named]
        used.update(spellings)
        if not spellings:
            if tensor.is_meta and not _matches(ignored_missing, name):
                missing.append(name)
            else:
                sources[name] = HeldTensor(tensor)
            continue
        stored = named[spellings[0]]
        if any(not _same_bytes(stored, named[other]) for other in spellings[1:]):
            return _converted(model, folder, dtype)
        if stored.shape != tuple(tensor.shape):
            misshapen.append(f"{name} is {list(stored.shape)} in the file, {list(tensor.shape)} in the model")
        sources[name] = stored
    unexpected = [name for name in named if name not in used and not _ignorable(model, name)]
    if misshapen and not missing and not unexpected:
        raise LoadError(f"the tensors in {folder} do not fit {type(model).__name__}: {'; '.join(misshapen[:4])}")
    if missing or unexpected:
        return _converted(model, folder, dtype)
    return sources, model


def _renamed(model: PreTrainedModel, files: dict[str, FileTensor]) -> dict[str, FileTensor]:
    """The files' tensors under the model's names, as far as transformers' own renaming rules go."""
    expected = model.state_dict()
    if all(name in expected for name in files):
        return files
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # these rules are transformers' own business and may move
        return files
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    named: dict[str, FileTensor] = {}
    for name in sorted(files):
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        named[name if converter is not None else renamed] = files[name]
    return named


def _converted(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> tuple[dict[str, Source], PreTrainedModel]:
    """Let transformers load the folder, and take over what it made: it knows conversions that are no renaming."""
    cls = model_class(model.config)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        outcome: Any = cls.from_pretrained(folder, dtype=dtype, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise LoadError(f"the weights in {folder} do not fit {cls.__name__}: {error}") from None
    loaded, report = outcome
    problems = {
        kind: sorted(map(str, report.get(f"{kind}_keys", ()))) for kind in ("missing", "unexpected", "mismatched")
    }
    told = [f"{len(names)} {kind}: {', '.join(names[:4])}" for kind, names in problems.items() if names]
    if told:
        raise LoadError(f"the tensors in {folder} do not fit {cls.__name__} ({'; '.join(told)})")
    return {name: HeldTensor(tensor.detach()) for name, tensor in named_tensors(loaded)}, loaded


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return aliases


def _same_bytes(one: FileTensor, other: FileTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 24
    with one.path.open("rb") as left, other.path.open("rb") as right:
        left.seek(one.offset)
        right.seek(other.offset)
        for start in range(0, one.nbytes, step):
            count = min(step, one.nbytes - start)
            if left.read(count) != right.read(count):
                return False
    return True


def _ignorable(model: PreTrainedModel, name: str) -> bool:
    """Leftovers of older versions, which transformers drops too: computed buffers, and what a class declares."""
    declared = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return _matches((*declared, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"), name)


def _matches(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
