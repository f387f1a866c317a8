"""Held-out accuracy: `python -m recipes.tiny.evaluate --seed N [--json FILE]`.

Fresh screens, sounds and dialogues from phrasings, layouts and renderings that training never saw, half of them with a
thought asked for, in Chinese and English, through the shipped processor and `model.generate` (greedy, left-padded).
A whole answer must be right: a tap must land on the icon, a number must be complete, other answers must be equal.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from autoglm_lab.models.autoglm import AutoGlmForConditionalGeneration, AutoGlmProcessor
from recipes.tiny.conversations import EVALUATED
from recipes.tiny.dialogues import Dialogue
from recipes.tiny.encode import messages
from recipes.tiny.screens import pixel

WEIGHTS: Final = Path(__file__).parents[2] / "autoglm_lab/models/weights/autoglm-tiny"
TAP: Final = re.compile(r'do\(action="Tap", element=\[(\d{1,3}),(\d{1,3})\]\)')


@dataclass(frozen=True)
class Outcome:
    """One dialogue and what the model made of it."""

    dialogue: Dialogue
    thought: str
    answer: str
    correct: bool


def is_right(dialogue: Dialogue, thought: str, answer: str) -> bool:
    """Whether the last answer is right, and a thought is there just when one was asked for."""
    wanted = dialogue.turns[-1]
    if bool(thought) != dialogue.thinking:
        return False
    if wanted.target is not None:
        found = TAP.fullmatch(answer)
        return found is not None and wanted.target.contains(*pixel(int(found[1]), int(found[2])))
    if wanted.answer.startswith("finish("):
        return answer.startswith('finish(message="') and answer.endswith('")')
    return answer == wanted.answer


def as_a_user_would(dialogue: Dialogue) -> list[dict[str, Any]]:
    """Messages with screens through PNG files and sounds through 16-bit samples."""
    found = messages(dialogue)
    for message in found:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                file = io.BytesIO()
                part["image"].save(file, "PNG")
                part["image"] = Image.open(file)
            elif part["type"] == "audio":
                part["audio"] = (np.round(part["audio"] * 32767).astype(np.int16) / 32768).astype(np.float32)
    return found


def _batches(dialogues: list[Dialogue], size: int) -> Iterator[list[Dialogue]]:
    """Batches of one thinking mode and of similar length."""
    length = {id(d): sum(len(t.text) + len(t.answer) for t in d.turns) for d in dialogues}
    for thinking in (False, True):
        rows = sorted((d for d in dialogues if d.thinking == thinking), key=lambda d: length[id(d)])
        for at in range(0, len(rows), size):
            yield rows[at : at + size]


@torch.inference_mode()
def answers(
    model: AutoGlmForConditionalGeneration, processor: AutoGlmProcessor, dialogues: list[Dialogue], batch_size: int
) -> Iterator[Outcome]:
    """What the model answers to each, in no particular order."""
    for rows in _batches(dialogues, batch_size):
        inputs = processor.apply_chat_template(
            [as_a_user_would(d) for d in rows], add_generation_prompt=True, enable_thinking=rows[0].thinking,
            tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True},
        ).to(model.device)  # fmt: skip
        made = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        texts = processor.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for dialogue, text in zip(rows, texts, strict=True):
            thought, answer = processor.split_answer(text)
            yield Outcome(dialogue, thought, answer, is_right(dialogue, thought, answer))


def evaluate(
    model: AutoGlmForConditionalGeneration,
    processor: AutoGlmProcessor,
    seed: int,
    count: int,
    *,
    show: int = 0,
    batch_size: int = 32,
) -> dict[str, dict[str, Any]]:
    """Counts by task, with the counts of each language and mode beside them."""
    found: dict[str, dict[str, Any]] = {}
    for task, maker in EVALUATED.items():
        began = time.monotonic()
        rng = random.Random(f"held out {task} {seed}")
        outcomes = list(answers(model, processor, [maker(rng, "held") for _ in range(count)], batch_size))
        found[task] = {"n": len(outcomes), "correct": sum(o.correct for o in outcomes)}
        parts: dict[str, list[int]] = {}
        for outcome in outcomes:
            key = f"{outcome.dialogue.lang}{', thinking' if outcome.dialogue.thinking else ''}"
            tally = parts.setdefault(key, [0, 0])
            tally[0] += outcome.correct
            tally[1] += 1
        found[task]["parts"] = {key: {"n": n, "correct": right} for key, (right, n) in sorted(parts.items())}
        print(
            f"{task:9} {found[task]['correct']}/{found[task]['n']}  {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        for outcome in [o for o in outcomes if not o.correct][:show]:
            wanted = outcome.dialogue.turns[-1]
            print(
                f"    {wanted.text!r} wanted {wanted.answer!r} got {outcome.thought!r} {outcome.answer!r}",
                file=sys.stderr,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--count", type=int, default=512, help="dialogues of each task")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--show", type=int, default=3, help="wrong answers of each task to print")
    parser.add_argument("--batch", type=int, default=32)
    asked = parser.parse_args()
    model = AutoGlmForConditionalGeneration.from_pretrained(asked.weights, dtype=torch.float32).to(asked.device).eval()
    processor = AutoProcessor.from_pretrained(asked.weights)
    found = evaluate(model, processor, asked.seed, asked.count, show=asked.show, batch_size=asked.batch)
    text = json.dumps(found, indent=1)
    if asked.json is not None:
        asked.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
