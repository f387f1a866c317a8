"""Texts of a stated number of tokens and pictures like a phone's screen, the same for the same seed."""

from __future__ import annotations

import random
from typing import Any

from PIL import Image, ImageDraw

from autoglm_lab.engine.messages import read_messages
from autoglm_lab.workbench import Workbench

_WORDS = ("open", "the", "clock", "and", "tell", "me", "what", "it", "says", "then", "scroll", "down", "tap", "back")


def text_of(workbench: Workbench, tokens: int, seed: int) -> str:
    """A text of ``tokens`` tokens, or of a few less where the tokenizer joins characters."""
    return text_for(workbench.processor, tokens, seed)


def text_for(processor: Any, tokens: int, seed: int) -> str:
    """The same where there is no workbench, but a processor or tokenizer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    chance = random.Random(seed)
    text = ""
    while (missing := tokens - _count(tokenizer, text)) > 0:
        text += " ".join(chance.choices(_WORDS, k=max(1, missing // 8))) + " "
    while text and _count(tokenizer, text) > tokens:
        text = text[:-1]
    return text


def prompt_of(workbench: Workbench, tokens: int, seed: int) -> str:
    """What a user says so that the whole prompt, markers included, has ``tokens`` tokens."""
    return text_of(workbench, tokens - (length(workbench, [user("x")]) - 1), seed)


def length(workbench: Workbench, messages: list[dict[str, Any]]) -> int:
    """Tokens of a dialogue as a prompt."""
    return length_for(workbench.processor, messages)


def length_for(processor: Any, messages: list[dict[str, Any]]) -> int:
    """The same where there is no workbench, but a processor."""
    batch = processor.apply_chat_template(
        [message.for_processor() for message in read_messages(messages)],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    ids = batch["input_ids"]
    return len(ids) if isinstance(ids[0], int) else len(ids[0])  # one dialogue, or a batch of one: a list or a tensor


def seen(processor: Any, tokens: int, picture: Image.Image, seed: int) -> dict[str, Any]:
    """A user's message with a picture, so that the whole prompt has ``tokens`` tokens."""
    return user(text_for(processor, tokens - (length_for(processor, [user("x", picture)]) - 1), seed), picture)


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    """A user's message, its images first."""
    return {"role": "user", "content": [*({"type": "image", "image": one} for one in images), _part(text)]}


def said(role: str, text: str) -> dict[str, Any]:
    """A message of text alone."""
    return {"role": role, "content": [_part(text)]}


def screen(seed: int, width: int = 1080, height: int = 2400) -> Image.Image:
    """A made-up phone screen: a bar, a grid of coloured icons, a dock."""
    chance = random.Random(seed)

    def colour() -> tuple[int, int, int]:
        return chance.randrange(256), chance.randrange(256), chance.randrange(256)

    image = Image.new("RGB", (width, height), colour())
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width, height // 30), fill=colour())
    cell = width // 4
    for top in range(height // 12, height - cell, cell):
        for left in range(0, width - cell // 2, cell):
            inset = cell // 6
            box = (left + inset, top + inset, left + cell - inset, top + cell - inset)
            draw.rounded_rectangle(box, radius=inset, fill=colour())
    draw.rectangle((0, height - height // 16, width, height), fill=colour())
    return image


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
