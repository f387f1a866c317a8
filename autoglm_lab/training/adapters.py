"""Low-rank adapters on a model that a workbench holds: added, switched, merged, saved. The layers are peft's."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoglm_lab.errors import TrainingError
from autoglm_lab.memory.ledger import Row
from autoglm_lab.models.decoder_layers import linear_layers
from autoglm_lab.models.quantized_linear import QuantizedLinear, shapes_alone

_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Adapters:
    """The adapters of one model, and their row in the ledger. Only the engine's thread changes them.

    Attributes:
        on: whether the model answers with them.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._configs: dict[str, LoraConfig] = {}
        self._row: Row | None = None
        self.on = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._configs)

    def add(self, name: str, *, rank: int, alpha: float, targets: Sequence[str] | None = None) -> None:
        """Put an adapter on linear layers; its weights begin as no change at all.

        Args:
            rank: of its two matrices.
            alpha: what they are scaled by is alpha / rank.
            targets: names of linear layers, or their last parts; None: every one of the decoder.

        Raises:
            TrainingError: the name is taken, or no layer is so named.
        """
        if name in self._configs:
            raise TrainingError(f"there is an adapter '{name}' already: remove it, or choose another name")
        chosen = chosen_layers(self._model, targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=0.0)  # type: ignore[arg-type]
        self._inject(name, config)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's weights by their names in the model."""
        part = f".{name}."
        return {key: value for key, value in self._model.named_parameters() if part in key and ".lora_" in key}

    def layers(self, name: str) -> dict[str, Any]:
        """The layers that an adapter is on, by their names in the model."""
        return {
            path: module
            for path, module in self._model.named_modules()
            if isinstance(module, BaseTunerLayer) and name in module.active_adapters
        }

    @torch.no_grad()
    def read_along(self, name: str, directions: Mapping[str, Tensor]) -> None:
        """Let an adapter read its inputs along these directions, ``[<= rank, in]`` by layer, and then as before."""
        layers = self.layers(name)
        for path, rows in directions.items():
            weight = layers[path].lora_A[name].weight
            weight[: len(rows)] = rows.to(weight)

    def switch(self, *, on: bool) -> None:
        """Let the model answer with its adapters, or as it was before."""
        for layer in self._layers():
            layer.enable_adapters(on)
            layer.requires_grad_(False)
        self.on = on

    def merge(self) -> int:
        """Add every adapter to the weights it stands on, and take it off. Returns bytes that this frees.

        Raises:
            TrainingError: one stands on weights that are kept quantised.
        """
        for layer in self._layers():
            frozen = layer.get_base_layer()
            if isinstance(frozen, QuantizedLinear):
                raise TrainingError(
                    f"the adapter cannot be merged into weights kept in {frozen.form.precision}: they would be "
                    "rounded again. Keep it on, or save it, load the model in its own precision, and merge it there"
                )
        with torch.inference_mode(mode=False), torch.no_grad():
            for layer in self._layers():
                base: Any = layer.get_base_layer()
                for name in layer.active_adapters:
                    if name in layer.lora_A:
                        # A write that the weights' version counts, so that parking keeps it.
                        base.weight.add_(layer.get_delta_weight(name).to(base.weight.dtype))
        return self.remove()

    def remove(self) -> int:
        """Take every adapter off. Returns bytes that this frees."""
        freed = self.nbytes
        for path, module in list(self._model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, last = path.rpartition(".")
                setattr(self._model.get_submodule(parent), last, module.get_base_layer())
        self._configs.clear()
        self._row, self.on = None, True
        vars(self._model).pop("peft_config", None)
        return freed

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write an adapter as peft reads it: safetensors and its configuration. The folder is whole or not there.

        Raises:
            TrainingError: there is no such adapter, or the folder exists.
        """
        known = self._known(name)
        return write_whole(Path(folder), lambda made: self._write(made, known))

    def load(self, folder: str | Path, name: str = "default") -> None:
        """Read an adapter that `save` or peft wrote.

        Raises:
            TrainingError: it is not one, or not for this model.
        """
        folder = Path(folder)
        if not (folder / _CONFIG).is_file() or not (folder / _WEIGHTS).is_file():
            raise TrainingError(f"'{folder}' holds no adapter: it needs {_CONFIG} and {_WEIGHTS}")
        if name in self._configs:
            raise TrainingError(f"there is an adapter '{name}' already: remove it, or choose another name")
        config = LoraConfig.from_pretrained(str(folder))
        self._inject(name, config)
        weights = {key.removeprefix(_PREFIX): value for key, value in load_file(folder / _WEIGHTS).items()}
        wanted = get_peft_model_state_dict(self._model, adapter_name=name)
        different = sorted(set(wanted) ^ set(weights)) or [k for k in wanted if wanted[k].shape != weights[k].shape]
        if different:
            self.remove()
            raise TrainingError(f"'{folder}' is an adapter of another model: {different[0]} does not fit this one")
        set_peft_model_state_dict(self._model, weights, adapter_name=name)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for name in self._configs for value in self.parameters(name).values())

    def holdings(self) -> Iterator[Row]:
        row = self._row
        if row is not None:
            yield row

    def _inject(self, name: str, config: LoraConfig) -> None:
        with torch.inference_mode(mode=False), warnings.catch_warnings(), shapes_alone():
            warnings.simplefilter("ignore")  # of tied weights, which only merging would touch
            try:
                inject_adapter_in_model(config, self._model, adapter_name=name)
            except ValueError as error:
                raise TrainingError(f"no adapter can be put there: {error}") from None
        self._configs[name] = config
        for parameter in self.parameters(name).values():
            parameter.data = parameter.data.float()
        for layer in self._layers():
            layer.set_adapter(list(self._configs))
            layer.requires_grad_(False)
        count = len(self._configs)
        self._row = Row(
            "adapters", "owner", "device", self.nbytes, f"low-rank weights of {count} adapter(s)", within="allocator"
        )

    def _write(self, folder: Path, name: str) -> None:
        weights = get_peft_model_state_dict(self._model, adapter_name=name)
        plain = {_PREFIX + key: value.detach().cpu().contiguous() for key, value in weights.items()}
        save_file(plain, folder / _WEIGHTS, {"format": "pt"})
        self._configs[name].save_pretrained(str(folder))

    def _known(self, name: str | None) -> str:
        chosen = name or next(iter(self._configs), None)
        if chosen is None or chosen not in self._configs:
            there = ", ".join(self._configs) or "none"
            raise TrainingError(f"there is no adapter {name or ''}: there are {there}")
        return chosen

    def _layers(self) -> list[Any]:
        return [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]


def chosen_layers(model: Any, targets: Sequence[str] | None) -> list[str]:
    """Names of the linear layers that ``targets`` means: whole names, or their last parts; None: all of the decoder.

    Raises:
        TrainingError: one of them means no layer.
    """
    if targets is None:
        return linear_layers(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | BaseTunerLayer)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names} - {"base_layer", "default"})
            raise TrainingError(f"the model has no linear layer '{target}': there are {', '.join(ends)}")
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def write_whole(folder: Path, write: Any) -> Path:
    """Let ``write`` fill a new folder, which appears under its name only when it is complete and on disk.

    Raises:
        TrainingError: the folder exists.
    """
    if folder.exists():
        raise TrainingError(f"'{folder}' exists: give another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    write(made)
    flush(made)
    made.replace(folder)
    return folder


def flush(folder: Path) -> None:
    """Wait until the files of a folder are on disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def adapter_summary(folder: str | Path) -> dict[str, Any]:
    """Rank, scale and layers of a saved adapter."""
    found: dict[str, Any] = json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))
    return {key: found.get(key) for key in ("r", "lora_alpha", "target_modules")}
