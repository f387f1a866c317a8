"""The sample images and sounds of the package, one click away in the chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoglm_lab.samples import SAMPLES, Sample
from autoglm_lab.widgets.attachments import Attachment, thumbnail


def cards(modalities: Sequence[str]) -> list[dict[str, Any]]:
    """The samples that a model with these modalities can take, as the chat shows them."""
    return [card(sample) for sample in SAMPLES if set(_kinds(sample)) <= set(modalities)]


def card(sample: Sample) -> dict[str, Any]:
    """One sample: its title and question by language, its kinds, and a small picture of its image."""
    picture = thumbnail(sample.image.read_bytes()) if sample.image is not None else {}
    return {
        "name": sample.name,
        "title": dict(sample.title),
        "prompt": dict(sample.prompt),
        "kinds": _kinds(sample),
        "thumb": picture.get("thumb", ""),
    }


def files(name: object) -> list[Attachment]:
    """The files of the sample with this name, read now; none where there is no such sample."""
    found: list[Attachment] = []
    for sample in SAMPLES:
        if sample.name == name and sample.image is not None:
            found.append(Attachment("image", sample.image.name, sample.image.read_bytes()))
        if sample.name == name and sample.audio is not None:
            found.append(Attachment("audio", sample.audio.name, sample.audio.read_bytes()))
    return found


def _kinds(sample: Sample) -> list[str]:
    return ["image"] * (sample.image is not None) + ["audio"] * (sample.audio is not None)
