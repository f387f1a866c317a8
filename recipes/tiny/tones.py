"""Sounds: keypad tones (DTMF), dial, busy and ringing tones, with noise, as 16 kHz mono float32 PCM.

Tone pairs from ITU-T Q.23; call progress tones from ITU-T E.180 (North American pairs and the 450 Hz used in China).
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from recipes.tiny.phrases import Split

RATE: Final = 16_000
MAX_SAMPLES: Final = 75_000
LOW: Final = (697.0, 770.0, 852.0, 941.0)
HIGH: Final = (1209.0, 1336.0, 1477.0)
KEYS: Final = "123456789*0#"
PAIRS: Final = {key: (LOW[i // 3], HIGH[i % 3]) for i, key in enumerate(KEYS)}
Progress = Literal["dial", "busy", "ringing"]
PROGRESS: Final[tuple[Progress, ...]] = ("dial", "busy", "ringing")
NOISES: Final[dict[Split, tuple[str, ...]]] = {"train": ("white", "pink", "hum", "room"), "held": ("brown", "hiss")}
Pcm = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """A sound and what is heard in it. `middles` are sample positions of each key's tone."""

    pcm: Pcm
    keys: str
    progress: Progress | None
    middles: tuple[int, ...]


def milliseconds(rng: random.Random, low: int, high: int, split: Split) -> int:
    """A whole number of milliseconds; those ending in 3 or 7 are held out."""
    while True:
        value = rng.randint(low, high)
        if (value % 10 in (3, 7)) == (split == "held"):
            return value


@functools.lru_cache(maxsize=16)
def noise_bank(kind: str, seed: int) -> Pcm:
    """Ten seconds of noise at unit power."""
    draw = np.random.default_rng([seed, *kind.encode()])
    count = 10 * RATE
    white = draw.standard_normal(count)
    if kind == "white":
        noise = white
    else:
        spectrum = np.fft.rfft(white)
        hertz = np.maximum(np.fft.rfftfreq(count, 1 / RATE), 20.0)
        if kind == "pink":
            spectrum *= hertz**-0.5
        elif kind == "brown":
            spectrum *= hertz**-0.9
        elif kind == "room":
            spectrum *= 1 / (1 + (hertz / 900) ** 2)
        elif kind == "hiss":
            spectrum *= 1 / (1 + (2500 / hertz) ** 2)
        else:
            spectrum *= 0.25
        noise = np.fft.irfft(spectrum, count)
        if kind == "hum":
            seconds = np.arange(count) / RATE
            noise = noise / noise.std() + sum(np.sin(2 * np.pi * 50 * k * seconds + k) / k for k in (1, 2, 3, 5)) * 1.2
    return np.asarray(noise / np.sqrt(np.mean(np.square(noise))), np.float32)


def _tone(rng: random.Random, pair: tuple[float, ...], samples: int, drift: float) -> Pcm:
    seconds = np.arange(samples, dtype=np.float32) / RATE
    twist = 10 ** (rng.uniform(-4, 4) / 40)
    gains = (twist, 1 / twist) if len(pair) == 2 else (1.4,)
    wave = np.zeros(samples, np.float32)
    for hertz, gain in zip(pair, gains, strict=True):
        wave += np.float32(gain) * np.sin(
            np.float32(2 * np.pi * hertz * drift) * seconds + np.float32(rng.uniform(0, 6.28))
        )
    ramp = min(samples // 4, rng.choice((8, 32, 64)))
    edge = np.linspace(0, 1, ramp, dtype=np.float32)
    wave[:ramp] *= edge
    wave[samples - ramp :] *= edge[::-1]
    return wave


def _finish(rng: random.Random, split: Split, wave: Pcm) -> Pcm:
    """Set the level and add noise at 15 to 30 dB below the tones (training: 13 to 34, and clean at times)."""
    level = np.float32(10 ** (rng.uniform(-32, -8) / 20))
    if split == "train" and rng.random() < 0.12:
        return np.clip(wave * level, -1, 1)
    ratio = rng.uniform(15, 30) if split == "held" else rng.uniform(13, 34)
    bank = noise_bank(rng.choice(NOISES[split]), rng.randrange(4))
    start = rng.randrange(len(bank) - len(wave))
    # A tone pair of unit gains has power 1, so that the noise gain follows from the ratio alone.
    noise = bank[start : start + len(wave)] * np.float32(10 ** (-ratio / 20))
    return np.clip((wave + noise) * level, -1, 1)


def keypad_clip(rng: random.Random, split: Split, keys: str) -> Clip:
    """The tones of `keys`: 50 to 250 ms each, 40 to 250 ms apart."""
    drift = 1 + rng.uniform(-0.012, 0.012)
    steady = rng.random() < 0.5
    tone, gap = milliseconds(rng, 50, 250, split), milliseconds(rng, 40, 250, split)
    lead, tail = milliseconds(rng, 0, 300, split), milliseconds(rng, 60, 350, split)
    parts, middles, at = [], [], lead * RATE // 1000
    for i, key in enumerate(keys):
        if not steady:
            tone, gap = milliseconds(rng, 50, 250, split), milliseconds(rng, 40, 250, split)
        length = tone * RATE // 1000
        parts.append((at, _tone(rng, PAIRS[key], length, drift)))
        middles.append(at + length // 2)
        at += length + (gap * RATE // 1000 if i + 1 < len(keys) else 0)
    wave = np.zeros(min(MAX_SAMPLES, at + tail * RATE // 1000), np.float32)
    for start, part in parts:
        wave[start : start + len(part)] += part
    return Clip(_finish(rng, split, wave), keys, None, tuple(middles))


def progress_clip(rng: random.Random, split: Split, kind: Progress) -> Clip:
    """A dial tone (steady), a busy tone (short beeps) or a ringing tone (one long ring, then silence)."""
    chinese = rng.random() < 0.5
    pair: tuple[float, ...] = (
        (450.0,) if chinese else {"dial": (350.0, 440.0), "busy": (480.0, 620.0), "ringing": (440.0, 480.0)}[kind]
    )
    drift = 1 + rng.uniform(-0.01, 0.01)
    total = milliseconds(rng, 1500, 4500, split)
    wave = np.zeros(total * RATE // 1000, np.float32)
    if kind == "dial":
        spans = [(0, total)]
    elif kind == "busy":
        on = 350 if chinese else 500
        on += rng.randint(-40, 40)
        start = rng.randint(0, 250)
        spans = [(at, min(total, at + on)) for at in range(start, total, 2 * on)]
    else:
        on, start = rng.randint(900, 2000), rng.randint(0, 300)
        wave = np.zeros(min(MAX_SAMPLES, max(len(wave), (start + on + 700) * RATE // 1000)), np.float32)
        spans = [(start, start + on)]
    for start, end in spans:
        first, last = start * RATE // 1000, min(len(wave), end * RATE // 1000)
        if last - first > 200:
            wave[first:last] += _tone(rng, pair, last - first, drift)
    return Clip(_finish(rng, split, wave), "", kind, ())


def quiet_clip(rng: random.Random, split: Split) -> Clip:
    """Noise alone."""
    wave = np.zeros(milliseconds(rng, 500, 3000, split) * RATE // 1000, np.float32)
    return Clip(_finish(rng, split, wave), "", None, ())
