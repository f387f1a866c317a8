from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from autoglm_lab.errors import MediaError
from autoglm_lab.widgets.attachments import LIMIT, Attachment, read_attachments


def png(width: int = 400, height: int = 200) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "PNG")
    return stream.getvalue()


def wav(seconds: float) -> bytes:
    stream = io.BytesIO()
    rise = np.linspace(0, 0.5, int(16000 * seconds), dtype=np.float32)
    soundfile.write(stream, rise, 16000, format="WAV")
    return stream.getvalue()


def test_an_image_becomes_a_part_and_a_card_with_a_small_picture():
    [image] = read_attachments([{"kind": "image", "name": "../a/screen.png"}], [memoryview(png())])
    assert image.part() == {"type": "image", "image": png()}
    card = image.card()
    assert (card["name"], card["width"], card["height"]) == ("screen.png", 400, 200)
    assert card["thumb"].startswith("data:image/png;base64,")
    assert len(card["thumb"]) < 4000


def test_a_sound_is_shown_with_its_length_and_outline():
    card = Attachment("audio", "tone.wav", wav(1.5)).card()
    assert card["seconds"] == 1.5
    assert card["peaks"][-1] == 1.0
    assert card["peaks"][0] < 0.1


def test_what_is_no_image_still_has_a_card():
    assert Attachment("image", "x.png", b"no picture").card() == {"kind": "image", "name": "x.png", "nbytes": 10}
    assert Attachment("audio", "x.wav", b"no sound").card() == {"kind": "audio", "name": "x.wav", "nbytes": 8}


def test_files_over_the_limit_are_refused_with_the_limit():
    with pytest.raises(MediaError, match=r"may have 8.0 MiB together, these have 8.0 MiB|8.1 MiB"):
        read_attachments([{"kind": "image", "name": "a"}], [bytes(LIMIT + 100_000)])


@pytest.mark.parametrize("files", [None, [], [{"kind": "video", "name": "a"}], ["a"], [{"kind": "image"}] * 2])
def test_a_list_that_does_not_fit_its_buffers_is_refused(files):
    with pytest.raises(MediaError):
        read_attachments(files, [b"x"])
