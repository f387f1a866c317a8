"""The modules of any transformers model: ``vision``, ``audio``, ``projector``, ``text``, ``head``.

Found through transformers' own accessors and each submodel's input, never by a list of model types. Every parameter
and persistent buffer belongs to exactly one module; what cannot be told apart is ``text``, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

ORDER = ("vision", "audio", "projector", "text", "head")
_INPUTS = {"vision": ("pixel_values",), "audio": ("input_features", "input_values", "audio_values")}
# What a family calls the configuration of its encoder; the last of the audio ones only where the model hears.
_STATED = {
    "vision": ("vision_config", "vq_config", "vit_config"),
    "audio": ("audio_config", "speech_config", "encoder_config"),
}
_MODALITY = {"vision": "image", "audio": "audio"}
_BETWEEN = re.compile(
    r"proj|connector|merger|adapt|resampl|q_?former|embed_vision|embed_audio|embed_image|newline", re.IGNORECASE
)


@dataclass(frozen=True)
class ModuleSpec:
    """A part of a model that can be placed on its own.

    Attributes:
        name: one of ``vision``, ``audio``, ``projector``, ``text``, ``head``.
        tensors: its parameters and persistent buffers, by their first name in the model; tied ones once.
        nbytes: their bytes.
        roots: the outermost submodules that hold nothing else; empty where the module has none of its own.
        note: what could not be told apart, in a sentence.
        card: number of the device that it is placed on.
    """

    name: str
    tensors: tuple[str, ...]
    nbytes: int
    roots: tuple[str, ...]
    note: str = ""
    card: int = 0


def anatomy(model: nn.Module) -> tuple[ModuleSpec, ...]:
    """The modules of ``model``, in the order `ORDER`; those that it lacks are left out.

    Works on the meta device. A head that is tied to the text's embeddings is part of ``text``.
    """
    tensors = dict(named_tensors(model))
    encoders = {name: _encoder(model, name) for name in _INPUTS}
    if encoders["audio"] is encoders["vision"]:
        encoders["audio"] = None
    owner: dict[int, str] = {}
    for name, encoder in encoders.items():
        _claim(owner, encoder, name)
    decoder = _decoder(model)
    head = _head(model)
    if decoder is not None and not any(_contains(decoder, encoder) for encoder in encoders.values()):
        _claim(owner, decoder, "text")
        _claim(owner, head, "head")
    else:
        embeddings = _quietly(model, "get_input_embeddings")
        _claim(owner, embeddings, "text")
        _claim(owner, head, "head")
    multimodal = any(encoder is not None for encoder in encoders.values())
    unclear = []
    for name, tensor in tensors.items():
        if id(tensor) in owner:
            continue
        between = multimodal and _is_between(model, name, decoder)
        owner[id(tensor)] = "projector" if between else "text"
        if multimodal and not between and not _inside(model, name, decoder):
            unclear.append(name)
    notes = {"text": _unclear_note(unclear, multimodal, model)}
    members: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        members.setdefault(owner[id(tensor)], []).append(name)
    roots = _roots(model, owner)
    return tuple(
        ModuleSpec(
            name,
            tuple(members[name]),
            sum(tensors[member].numel() * tensors[member].element_size() for member in members[name]),
            tuple(roots.get(name, ())),
            notes.get(name, ""),
        )
        for name in ORDER
        if name in members
    )


def parted(model: nn.Module, specs: tuple[ModuleSpec, ...], card_of: Callable[[str], int]) -> tuple[ModuleSpec, ...]:
    """The same modules, those on several devices as one for each: ``text`` on the first, ``text@1`` on the second."""
    tensors = dict(named_tensors(model))
    members: dict[tuple[str, int], list[str]] = {}
    for spec in specs:
        for name in spec.tensors:
            members.setdefault((spec.name, card_of(name)), []).append(name)
    # A module that lies on one device alone keeps its name.
    cards = {spec.name: sorted(card for name, card in members if name == spec.name) for spec in specs}
    called = {(name, card): name if card == cards[name][0] else f"{name}@{card}" for name, card in members}
    roots = _roots(model, {id(tensors[one]): called[key] for key, names in members.items() for one in names})
    notes = {spec.name: spec.note for spec in specs}
    return tuple(
        ModuleSpec(
            called[key],
            tuple(names),
            sum(tensors[one].numel() * tensors[one].element_size() for one in names),
            tuple(roots.get(called[key], ())),
            notes[key[0]],
            key[1],
        )
        for key, names in sorted(members.items(), key=lambda one: (ORDER.index(one[0][0]), one[0][1]))
    )


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, each once, by first name."""
    yield from model.named_parameters()
    seen: set[int] = set()
    for path, module in model.named_modules():
        computed = module._non_persistent_buffers_set  # noqa: SLF001 - torch tells it nowhere else
        for name, buffer in module.named_buffers(recurse=False):
            if name in computed or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            yield (f"{path}.{name}" if path else name), buffer


def _encoder(model: nn.Module, name: str) -> nn.Module | None:
    get_encoder = getattr(model, "get_encoder", None)
    if get_encoder is not None:
        try:
            found: Any = get_encoder(_MODALITY[name])
        except (TypeError, ValueError, AttributeError):
            found = None
        if isinstance(found, nn.Module) and _is_own(model, found):
            return found
    stated = _stated(model, name)
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        takes_it = config is not None and getattr(module, "main_input_name", None) in _INPUTS[name]
        made_for_it = config is not None and stated is not None and (config is stated or type(config) is type(stated))
        if path and (takes_it or made_for_it) and isinstance(module, nn.Module) and _is_own(model, module):
            return module
    return None


def _stated(model: nn.Module, name: str) -> Any:
    """The configuration of the encoder, by the names that families give it."""
    config = getattr(model, "config", None)
    for attribute in _STATED[name]:
        stated = getattr(config, attribute, None)
        if stated is not None and (attribute != "encoder_config" or hasattr(model, f"get_{_MODALITY[name]}_features")):
            return stated
    return None


def _is_own(model: nn.Module, found: nn.Module) -> bool:
    """Whether ``found`` is an encoder: not the model itself, nor a part that also holds the text's embeddings."""
    if found is model or found is getattr(model, "base_model", None):
        return False
    held = {id(tensor) for _, tensor in named_tensors(found)}
    embeddings = _quietly(model, "get_input_embeddings")
    return bool(held) and (embeddings is None or not any(id(weight) in held for _, weight in named_tensors(embeddings)))


def _decoder(model: nn.Module) -> nn.Module | None:
    found = _quietly(model, "get_decoder")
    return found if isinstance(found, nn.Module) and found is not model else None


def _head(model: nn.Module) -> nn.Module | None:
    head = _quietly(model, "get_output_embeddings")
    return head if isinstance(head, nn.Module) else None


def _quietly(model: nn.Module, accessor: str) -> Any:
    """What transformers' accessor finds; None for models that lack it or do not implement it."""
    try:
        return getattr(model, accessor)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _claim(owner: dict[int, str], module: nn.Module | None, name: str) -> None:
    if module is not None:
        for _, tensor in named_tensors(module):
            owner.setdefault(id(tensor), name)


def _contains(module: nn.Module, part: nn.Module | None) -> bool:
    return part is not None and any(child is part for child in module.modules())


def _path(model: nn.Module, tensor: str) -> list[tuple[str, nn.Module]]:
    path, module = [], model
    for step in tensor.split(".")[:-1]:
        module = getattr(module, step)
        path.append((step, module))
    return path


def _is_between(model: nn.Module, tensor: str, decoder: nn.Module | None) -> bool:
    steps = _path(model, tensor)
    if any(module is decoder for _, module in steps) and decoder is not getattr(model, "base_model", None):
        return False
    for step, module in steps:
        if step.isdigit():  # a layer of something: its parts are called "proj" everywhere
            return False
        if _BETWEEN.search(step) or _BETWEEN.search(type(module).__name__):
            return True
    return len(steps) <= 1 and _BETWEEN.search(tensor.rsplit(".", 1)[-1]) is not None


def _inside(model: nn.Module, tensor: str, decoder: nn.Module | None) -> bool:
    return decoder is not None and any(module is decoder for _, module in _path(model, tensor))


def _unclear_note(unclear: list[str], multimodal: bool, model: nn.Module) -> str:
    if unclear:
        return f"{len(unclear)} tensors of no clear module are counted here, for example {unclear[0]}"
    config = getattr(model, "config", None)
    hidden = [part for part in ("vision", "audio") if getattr(config, f"{part}_config", None) is not None]
    if hidden and not multimodal:
        return f"the {' and '.join(hidden)} part of this model could not be told apart and is counted here"
    return ""


def _roots(model: nn.Module, owner: dict[int, str]) -> dict[str, list[str]]:
    """The outermost submodules whose tensors all belong to one module."""
    roots: dict[str, list[str]] = {}

    def visit(path: str, module: nn.Module) -> None:
        owners = {owner[id(tensor)] for _, tensor in named_tensors(module)}
        if len(owners) == 1:
            roots.setdefault(owners.pop(), []).append(path)
        elif owners:
            for step, child in module.named_children():
                visit(f"{path}.{step}" if path else step, child)

    visit("", model)
    return roots
