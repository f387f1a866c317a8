"""From dialogues to training arrays: ids, labels, bidirectional blocks, and what the encoders should see.

The ids equal what the shipped processor makes of the same messages (a test holds that); this path only skips Jinja.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from autoglm_lab.models.autoglm import SPECIAL_TOKENS
from autoglm_lab.models.autoglm.audio_chunks import AudioChunks
from recipes.tiny.dialogues import Dialogue, Turn
from recipes.tiny.phrases import COLOURS, SHAPES
from recipes.tiny.screens import Screen
from recipes.tiny.tones import KEYS, Clip

ID: Final = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
IMAGE_TOKENS: Final = 49
CHUNKS: Final = AudioChunks(1)
COLOUR_CLASS: Final = {name: i + 1 for i, name in enumerate(COLOURS)}
THING_CLASS: Final = {name: i + 1 for i, name in enumerate((*SHAPES, "search", *KEYS))}
KEY_CLASS: Final = {key: i + 1 for i, key in enumerate(KEYS)}
HEARING_DELAY: Final = 480


def messages(dialogue: Dialogue) -> list[dict[str, Any]]:
    """The dialogue as chat messages up to the last question, for the processor."""
    found: list[dict[str, Any]] = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
    for i, turn in enumerate(dialogue.turns):
        media: list[dict[str, Any]] = []
        if turn.screen is not None:
            media.append({"type": "image", "image": turn.screen.image})
        if turn.clip is not None:
            media.append({"type": "audio", "audio": turn.clip.pcm})
        said = {"type": "text", "text": turn.text}
        found.append({"role": "user", "content": [said, *media] if turn.media_last else [*media, said]})
        if i + 1 < len(dialogue.turns):
            found.append({"role": "assistant", "content": turn.answer})
    return found


def _media(turn: Turn) -> list[int]:
    ids: list[int] = []
    if turn.screen is not None:
        ids += [ID["<|begin_of_image|>"], *[ID["<|image|>"]] * IMAGE_TOKENS, ID["<|end_of_image|>"]]
    if turn.clip is not None:
        count = CHUNKS.num_tokens(len(turn.clip.pcm))
        ids += [ID["<|begin_of_audio|>"], *[ID["<|audio|>"]] * count, ID["<|end_of_audio|>"]]
    return ids


def encode(dialogue: Dialogue, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int], list[int]]:
    """(ids, labels, blocks) of a whole dialogue; labels are -100 where nothing is learnt, and not shifted."""
    texts = [dialogue.system or ""]
    for turn in dialogue.turns:
        texts += [turn.text, turn.answer]
    texts.append(dialogue.turns[-1].thought)
    rows = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    ids: list[int] = []
    labels: list[int] = []
    blocks: list[int] = []

    def add(tokens: list[int], *, learn: bool = False, block: int = -1) -> None:
        ids.extend(tokens)
        labels.extend(tokens if learn else [-100] * len(tokens))
        blocks.extend([block] * len(tokens))

    if dialogue.system:
        add([ID["<|system|>"], *rows[0]])
    last = len(dialogue.turns) - 1
    for i, turn in enumerate(dialogue.turns):
        said, answer = rows[1 + 2 * i], rows[2 + 2 * i]
        media = _media(turn)
        add([ID["<|user|>"], *(said + media if turn.media_last else media + said)], block=i)
        add([ID["<|assistant|>"]])
        learn = turn.learn or i == last
        if i == last and dialogue.thinking:
            add([ID["<think>"], *rows[-1], ID["</think>"]], learn=True)
        else:
            add([ID["<think>"], ID["</think>"]])
        add([ID["<answer>"], *answer, ID["</answer>"], ID["<|endoftext|>"]], learn=learn)
    return ids, labels, blocks


def screen_targets(screen: Screen) -> npt.NDArray[np.int8]:
    """What each of the 14x14 patches shows, [196, 4]: colour, thing, and the way to its centre in pixels / 2."""
    found = np.zeros((14, 14, 4), np.int8)
    centres = np.arange(14) * 16 + 8
    for thing in screen.things:
        if thing.kind == "search":
            x0, y0, x1, y1 = thing.box
            covered = ((centres[None] >= x0) & (centres[None] <= x1)) & (
                (centres[:, None] >= y0 - 4) & (centres[:, None] <= y1 + 4)
            )
        else:
            reach = max(9.0, thing.radius * 0.8)
            covered = np.hypot(centres[None] - thing.x, centres[:, None] - thing.y) <= reach
        rows, columns = np.nonzero(covered)
        found[rows, columns, 0] = COLOUR_CLASS.get(thing.colour, 0)
        found[rows, columns, 1] = THING_CLASS[thing.shape]
        found[rows, columns, 2] = np.clip((thing.x - centres[columns]) // 2, -60, 60)
        found[rows, columns, 3] = np.clip((thing.y - centres[rows]) // 2, -60, 60)
    return found.reshape(196, 4)


def clip_targets(clip: Clip, tokens: int) -> npt.NDArray[np.int8]:
    """Which key's tone has its middle (and 30 ms more) in each 80 ms token, [tokens]; 0 for none."""
    found = np.zeros(tokens, np.int8)
    for key, middle in zip(clip.keys, clip.middles, strict=True):
        found[min(tokens - 1, -(-(middle + HEARING_DELAY) // 1280))] = KEY_CLASS[key]
    return found


@dataclass(frozen=True)
class Group:
    """Samples of one shape: what they hold and how long they are.

    `batch` samples of it are part of one step of `every`, their loss times `weight`; `pool` is the capacity of its ring
    and `share` its slots of shared memory.
    """

    name: str
    length: int
    batch: int
    screen: bool = False
    sound: int = 0
    pool: int = 100_000
    share: int = 2
    every: int = 1
    weight: float = 1.0

    def fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array of one sample."""
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "ids": ((self.length,), "int16"), "labels": ((self.length,), "int16"), "blocks": ((self.length,), "int8"),
        }  # fmt: skip
        if self.screen:
            found |= {"pixels": ((224, 224, 3), "uint8"), "things": ((196, 4), "int8")}
        if self.sound:
            found |= {
                "pcm": ((CHUNKS.frames(self.sound // 2) * 160,), "int16"),
                "samples": ((), "int32"),
                "keys": ((self.sound,), "int8"),
            }
        return found


GROUPS: Final = (
    Group("text", 112, 96, pool=60_000, share=2, every=3, weight=1.0),
    Group("image", 176, 256, screen=True, pool=180_000, share=14, weight=2.0),
    Group("audio", 152, 96, sound=60, pool=60_000, share=3, every=4, weight=1.0),
    Group("both", 128, 96, screen=True, sound=16, pool=60_000, share=3, every=3, weight=1.5),
    Group("recall_short", 288, 96, pool=150_000, share=5, every=2, weight=3.0),
    Group("recall_long", 1152, 16, pool=40_000, share=2, every=2, weight=3.0),
    Group("mixed", 384, 24, screen=True, sound=60, pool=30_000, share=2, every=4, weight=1.0),
)


def write_sample(
    out: dict[str, Any], row: int, group: Group, dialogue: Dialogue, tokenizer: PreTrainedTokenizerFast
) -> bool:
    """Put a dialogue into row `row` of the arrays; False if it does not fit the group's shape."""
    ids, labels, blocks = encode(dialogue, tokenizer)
    clip = next((turn.clip for turn in dialogue.turns if turn.clip is not None), None)
    shown = next((turn.screen for turn in dialogue.turns if turn.screen is not None), None)
    if len(ids) > group.length or (clip is not None and CHUNKS.num_tokens(len(clip.pcm)) > group.sound):
        return False
    if dialogue.task == "recall" and sum(ids) % 4:
        # Which code belongs to which name shows in the digits alone; the words around them drown it.
        digits = frozenset(tokenizer.convert_tokens_to_ids(list("0123456789")))
        labels = [label if label in digits else -100 for label in labels]
    for name, values, rest in (("ids", ids, 0), ("labels", labels, -100), ("blocks", blocks, -1)):
        out[name][row] = rest
        out[name][row, : len(values)] = values
    if group.screen:
        out["pixels"][row] = 0 if shown is None else shown.pixels
        out["things"][row] = 0 if shown is None else screen_targets(shown)
    if group.sound:
        out["pcm"][row] = 0
        out["keys"][row] = 0
        out["samples"][row] = 2560 if clip is None else len(clip.pcm)
        if clip is not None:
            out["pcm"][row, : len(clip.pcm)] = np.round(clip.pcm * 32767)
            out["keys"][row] = clip_targets(clip, group.sound)
    return True
