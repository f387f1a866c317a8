"""Fine-tune the embedded model on a colour it never saw: `python -m recipes.tiny.learn_colour`.

Accuracy before and after, on taps of held-out looks and words (`new_colour.held_out`) and the old tasks (`evaluate`).
The adapter is on what sees (the feed-forward layers of the vision tower and what joins it to the decoder) and on what
reads the words (the first half of the decoder); the layers that count and answer stay as they are. The mean over
the last steps is kept: it forgets less than what the last step made.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import autoglm_lab as lab
from recipes.tiny import new_colour
from recipes.tiny.evaluate import answers, evaluate

_LAYER: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj",
                 "mlp.down_proj")  # fmt: skip
DECODER: Final = tuple(f"language_model.layers.{layer}.{name}" for layer in range(3) for name in _LAYER)
# Held-out taps on the new colour.
TAPS: Final = 1024
VISION: Final = ("fc1", "fc2", "merger", "vision_projector.linear_1", "vision_projector.linear_2")


def learn(wb: Any, data: Path, steps: int, rate: float) -> Any:
    """The training; its result."""
    wb.policy = wb.policy.replace(training={"checkpointing": "none", "micro_batch": 8, "accumulation": 1})
    run = wb.finetune(
        data, steps=steps, learning_rate=rate, schedule="constant", ema=0.99, weight_decay=1.0, rank=8, alpha=16.0,
        targets=[*DECODER, *VISION], all_answers=True,
        watch=lambda run: print(run, flush=True) if run.step % 10 == 0 and run.step else None,
    )  # fmt: skip
    return run.result()


def correct(wb: Any, count: int, seed: int) -> float:
    """Share of held-out taps on the new colour that hit."""
    outcomes = list(answers(wb.model, wb.processor, new_colour.held_out(count, seed), 32))
    return sum(outcome.correct for outcome in outcomes) / len(outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=2800)
    parser.add_argument("--steps", type=int, default=520, help="of 8 dialogues")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--dtype", default="bfloat16", help="of the training; float32 where a CPU is slow in bfloat16")
    parser.add_argument("--count", type=int, default=256, help="held-out dialogues of each old task; 0: none")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()

    def judged(wb: Any, when: str) -> dict[str, Any]:
        old = {f"old tasks {when}": evaluate(wb.model, wb.processor, 57, asked.count)} if asked.count else {}
        return {when: correct(wb, TAPS, asked.seed)} | old

    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        data = new_colour.write(Path(folder), asked.dialogues)
        with lab.load("autoglm-tiny", device="cpu", dtype=asked.dtype) as wb:
            wall, cpu = time.monotonic(), time.process_time()
            result = learn(wb, data, asked.steps, asked.rate)
            took = {"seconds": time.monotonic() - wall, "cpu seconds": time.process_time() - cpu}
            wb.tuner.save(adapter)
        with lab.load("autoglm-tiny", device="cpu", dtype="float32") as wb:
            before = judged(wb, "before")
            wb.tuner.load(adapter)
            found = before | took | {"result": repr(result)} | judged(wb, "after")
    text = json.dumps(found, indent=1)
    if asked.json is not None:
        asked.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
