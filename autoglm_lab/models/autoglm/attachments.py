"""Images and sounds as people hand them over: PIL images, arrays, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoglm_lab.errors import MediaError

SAMPLING_RATE = 16_000


def flat(items: Any) -> list[Any]:
    """A flat list of what was passed: one thing, a list, or nested lists; a list of numbers is one sound."""
    if items is None:
        return []
    if not isinstance(items, (list, tuple)):
        return [items]
    if items and all(isinstance(item, (int, float)) for item in items):
        return [np.asarray(items, dtype=np.float32)]
    return [leaf for item in items for leaf in flat(item)]


def read_image(image: Any) -> Any:
    """An RGB image from a PIL image or a path; arrays and tensors pass.

    Raises:
        MediaError: A URL: nothing is fetched here.
    """
    if isinstance(image, (str, Path)):
        with Image.open(_local(image)) as opened:
            return opened.convert("RGB")
    return image.convert("RGB") if isinstance(image, Image.Image) else image


def read_audio(sound: Any) -> NDArray[np.float32]:
    """16 kHz mono samples [samples] in -1..1 from an array, tensor, list or file; files of other rates are resampled.

    Raises:
        MediaError: A URL, or an array that is not one-dimensional.
        ImportError: A file, and soundfile is not installed.
    """
    if isinstance(sound, (str, Path)):
        import soundfile

        samples, rate = soundfile.read(_local(sound), dtype="float32", always_2d=True)
        return resample(samples.mean(axis=1), rate)
    array = np.asarray(sound)
    if array.ndim != 1:
        raise MediaError(f"a sound is a one-dimensional array of 16 kHz mono samples, got shape {list(array.shape)}")
    if np.issubdtype(array.dtype, np.integer):
        return (array / -float(np.iinfo(array.dtype).min or -1)).astype(np.float32)
    return array.astype(np.float32)


def resample(samples: NDArray[np.float32], rate: int, to: int = SAMPLING_RATE) -> NDArray[np.float32]:
    """Samples [n] at `rate` Hz -> [n * to / rate] at `to` Hz, by a Hann-windowed sinc of 16 zero crossings a side."""
    if rate == to or not len(samples):
        return samples
    cutoff = min(1.0, to / rate)
    reach = math.ceil(16 / cutoff)
    times = np.arange(math.ceil(len(samples) * to / rate)) * (rate / to)
    offsets = np.arange(-reach + 1, reach + 1)
    padded = np.pad(samples.astype(np.float64), reach)
    out = np.empty(len(times), dtype=np.float32)
    for start in range(0, len(times), 65_536):
        base = np.floor(times[start : start + 65_536]).astype(np.int64)
        distance = (times[start : start + 65_536] - base)[:, None] - offsets
        window = np.where(np.abs(distance) < reach, 0.5 + 0.5 * np.cos(np.pi * distance / reach), 0.0)
        kernel = cutoff * np.sinc(cutoff * distance) * window
        out[start : start + 65_536] = (padded[base[:, None] + offsets + reach] * kernel).sum(axis=1)
    return out


def _local(path: str | Path) -> Path:
    if isinstance(path, str) and "://" in path:
        raise MediaError(f"{path[:60]!r} is a URL: it is not fetched here, pass a file, an image or samples")
    return Path(path)
