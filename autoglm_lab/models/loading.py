"""From a preset, a folder, a hub id or a configuration to a model whose weights are still elsewhere.

`resolve` reads configurations and file headers only: the model that comes out has its parameters on the meta device,
its computed buffers real, and beside it where the bytes of each tensor are. `memory/` materialises them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from autoglm_lab.errors import LoadError
from autoglm_lab.models import catalog, checkpoint, hub
from autoglm_lab.models.anatomy import named_tensors
from autoglm_lab.models.checkpoint import FileTensor
from autoglm_lab.models.garbage_collection import no_collection
from autoglm_lab.models.location import has_processor, locate, processor_of, read_allowed
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.models.tensor_sources import HeldTensor, Source, dummy_sources, file_sources

_STORED_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@no_collection()
def resolve(
    source: str | Path | PreTrainedConfig,
    *,
    weights: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    seed: int = 0,
    allow: str | Collection[str] = (),
    progress: bool = False,
) -> Resolved:
    """Find out what ``source`` is and where its bytes are; no weight is read.

    Args:
        source: a preset (``autoglm-tiny``), a folder of safetensors, a hub id (fetched where the local cache lacks
            it), or a configuration object (which needs ``weights="dummy"`` or a folder).
        weights: None: those of ``source``; ``"dummy"``: made up; a folder: those there.
        dtype: ``auto``: float32 on CPU, the file's on a GPU; or ``float32``, ``bfloat16``, ``float16``.
        device: None: ``cuda:0`` if there is one, else ``cpu``.
        seed: of dummy weights.
        allow: what is refused otherwise, by name: ``pickle`` (weights that can run any code when read),
            ``remote-code`` (a model's own Python files).
        progress: show how far a download is.

    Raises:
        LoadError: unknown source, pickled weights, remote code, a corrupt file, missing or unexpected tensors.
    """
    import autoglm_lab.models.autoglm  # noqa: F401 - registers the architecture with transformers' Auto classes

    place = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    allowed = read_allowed(allow)
    located = locate(source, weights=weights is None, allow=allowed, progress=progress)
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
            f"{_fetched_by(located.name)}"
        )
    files = {} if folder is None else checkpoint.read_folder(folder, allowed)
    chosen = _dtype(dtype, place, files, config)
    model = skeleton(config, chosen)
    # Weights from elsewhere bring the processor that belongs to them.
    own = folder is not None and folder != located.folder and has_processor(folder)
    processor, notes = processor_of(folder, allowed) if own else located.processor()
    if folder is None:
        sources, found = dummy_sources(model, config, seed), model
        notes += ("the weights are made up: answers are noise, memory and speed are true",)
    else:
        sources, found = file_sources(model, files, folder, chosen)
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
        processor: makes the model's processor or tokenizer, once; None where there is none.
    """

    name: str
    model: PreTrainedModel
    dtype: torch.dtype
    processor: Callable[[], Any]


def outline(source: str | Path | PreTrainedConfig, *, device: str = "cuda") -> Outline:
    """Find out what ``source`` is, as `resolve` does, from configurations and the headers of files alone.

    Args:
        source: as for `resolve`; of a hub id only the configuration is fetched, where no preset knows it.
        device: ``cuda`` or ``cpu``: decides the dtype.

    Raises:
        LoadError: unknown source, remote code, a corrupt file.
    """
    import autoglm_lab.models.autoglm  # noqa: F401 - registers the architecture with transformers' Auto classes

    known = {preset.repo_id: preset.name for preset in catalog.presets() if preset.repo_id is not None}
    if isinstance(source, str) and source in known and hub.cached(source, weights=False) is None:
        source = known[source]
    located = locate(source, weights=False)
    # The headers of the files say the dtype; where only the configuration was fetched, that does.
    headers = located.folder is not None and hub.has_weights(located.folder)
    files = checkpoint.read_folder(located.folder) if headers and located.folder is not None else {}
    dtype = _dtype("auto", torch.device(device), files, located.config)
    return Outline(located.name, skeleton(located.config, dtype), dtype, cache(lambda: located.processor()[0]))


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


def _dtype(
    asked: str | torch.dtype, device: torch.device, files: dict[str, FileTensor], config: PreTrainedConfig
) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    if asked in _STORED_NAMES:
        return _STORED_NAMES[asked]
    if asked != "auto":
        raise LoadError(f"there is no dtype {asked!r}: use auto, {', '.join(_STORED_NAMES)}")
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


def _fetched_by(name: str) -> str:
    repo_id = catalog.preset(name).repo_id if name in catalog.names() else None
    return "" if repo_id is None else f", or load {repo_id!r}, which fetches the public ones"


def _generation_config(folder: Path | None) -> GenerationConfig | None:
    if folder is None or not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise LoadError(f"{folder / 'generation_config.json'} cannot be read: {error}") from None
