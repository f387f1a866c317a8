"""What encoding one image or sound allocates: recorded for one size, and for any where it grows with the patches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from autoglm_lab.memory.planning.tape import Tape, TapeFamily
from autoglm_lab.memory.planning.traced_model import TracedModel
from autoglm_lab.memory.planning.workload import Workload

Medium = Literal["vision", "audio"]
Encoding = tuple[Tape, int]
"""What encoding allocates, with its output at the end; and the output's bytes."""

_GRIDS = ((16, 24), (32, 48))
_MOST_KEPT = 64
_NEAR = 0.01


@dataclass(frozen=True, eq=False)
class MediumInputs:
    """One image or sound as the model's encoder is given it.

    Attributes:
        tensors: by the argument's name; of large ones only the shape counts.
    """

    medium: Medium
    tensors: Mapping[str, Tensor]

    @property
    def key(self) -> tuple[Any, ...]:
        """What the encoder's work depends on: shapes, and the values of small tensors of numbers that count."""
        return (self.medium, *(_told(name, tensor) for name, tensor in sorted(self.tensors.items())))

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches of one image, where the model is told them."""
        told = self.tensors.get("image_grid_thw")
        if told is None or tuple(told.shape) != (1, 3) or int(told[0, 0]) != 1:
            return None
        return int(told[0, 1]), int(told[0, 2])


class EncoderTapes:
    """The tapes of a model's encoders.

    Args:
        tracer: gives the model to record; it may refuse by raising, and is asked before each recording.
    """

    def __init__(self, tracer: Callable[[], TracedModel]) -> None:
        self._tracer = tracer
        self._kept: dict[tuple[Any, ...], Encoding] = {}
        self._family: tuple[TapeFamily, float] | None = None
        self._grows: bool | None = None
        self._first: tuple[int, Encoding] | None = None

    def of(self, inputs: MediumInputs) -> Encoding:
        """What encoding these allocates. From the second size on, images of patches need no recording of their own."""
        key, grid = inputs.key, inputs.grid
        found = self._kept.get(key)
        if found is not None:
            return found
        if grid is not None and self._learn(inputs):
            assert self._family is not None
            family, width = self._family
            patches = grid[0] * grid[1]
            return family.at(patches), round(width * patches)
        found = self._record(inputs)
        while len(self._kept) >= _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = found
        if grid is not None and self._first is None:
            self._first = grid[0] * grid[1], found
        return found

    def _record(self, inputs: MediumInputs) -> Encoding:
        kind: Literal["image", "audio"] = "image" if inputs.medium == "vision" else "audio"
        return self._tracer().encode(kind, dict(inputs.tensors))

    def _learn(self, inputs: MediumInputs) -> bool:
        """Whether the tapes of this model's images are known for every number of patches.

        From two small images; the first one that was asked for has to be as they tell.
        """
        if self._grows is None and self._first is not None:
            sizes = [rows * columns for rows, columns in _GRIDS]
            patches, (tape, nbytes) = self._first
            try:
                small = [self._record(_grid_of(inputs, rows, columns)) for rows, columns in _GRIDS]
                family = TapeFamily(lambda patches: (1, patches), [((sizes[at],), small[at][0]) for at in (0, 1)])
            except (ValueError, RuntimeError, TypeError, LookupError):  # it goes another way at other sizes
                self._grows = False
                return False
            width = small[0][1] / sizes[0]
            told = family.at(patches).peak
            self._grows = abs(told - tape.peak) <= _NEAR * tape.peak and abs(width * patches - nbytes) <= 512
            self._family = (family, width) if self._grows else None
        return bool(self._grows)


def blank(processor: Any, model: Any, medium: Medium, workload: Workload) -> MediumInputs:
    """One blank image or silent sound of the workload's size, as the model's processor prepares it."""
    if medium == "vision":
        from PIL import Image

        given = processor.image_processor(images=[Image.new("RGB", workload.image_size)], return_tensors="pt")
        encoder = model.get_image_features
    else:
        front = processor.feature_extractor
        silence = np.zeros(round(workload.audio_seconds * front.sampling_rate), np.float32)
        given = front(silence, sampling_rate=front.sampling_rate, return_tensors="pt")
        encoder = model.get_audio_features
    accepted = inspect.signature(encoder).parameters
    tensors = {name: value for name, value in given.items() if name in accepted and isinstance(value, Tensor)}
    return MediumInputs(medium, tensors)


def _told(name: str, tensor: Tensor) -> tuple[Any, ...]:
    counts = not tensor.is_floating_point() and tensor.numel() <= 64 and tensor.device.type == "cpu"
    return name, tuple(tensor.shape), tuple(tensor.flatten().tolist()) if counts else ()


def _grid_of(inputs: MediumInputs, rows: int, columns: int) -> MediumInputs:
    """The same image in another number of patches."""
    pixels = inputs.tensors["pixel_values"]
    made = torch.empty(rows * columns, *pixels.shape[1:], dtype=pixels.dtype)
    grid = torch.tensor([[1, rows, columns]])
    return MediumInputs(inputs.medium, {**inputs.tensors, "pixel_values": made, "image_grid_thw": grid})
