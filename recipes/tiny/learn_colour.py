"""Fine-tune the embedded model on a colour it never saw: `python -m recipes.tiny.learn_colour`.

Accuracy before and after, on taps of held-out looks and words (`new_colour.held_out`) and the old tasks (`evaluate`).
The adapter is on the linear layers of the decoder, of the vision tower and of what joins them.
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

DECODER: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
VISION: Final = ("fc1", "fc2", "merger", "vision_projector.linear_1", "vision_projector.linear_2")


def learn(wb: Any, data: Path, steps: int, rate: float) -> Any:
    """The training; its result."""
    wb.policy = wb.policy.replace(training={"checkpointing": "none", "micro_batch": 8, "accumulation": 2})
    run = wb.finetune(
        data, steps=steps, learning_rate=rate, rank=16, alpha=32.0, targets=[*DECODER, *VISION],
        watch=lambda run: print(run, flush=True) if run.step % 10 == 0 and run.step else None,
    )  # fmt: skip
    return run.result()


def correct(wb: Any, count: int, seed: int) -> float:
    """Share of held-out taps on the new colour that hit."""
    outcomes = list(answers(wb.model, wb.processor, new_colour.held_out(count, seed), 32))
    return sum(outcome.correct for outcome in outcomes) / len(outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=250, help="of 16 dialogues")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--count", type=int, default=256, help="held-out dialogues a task; 0 leaves the old tasks out")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, lab.load("autoglm-tiny", device="cpu") as wb:
        data = new_colour.write(Path(folder), asked.dialogues)
        found: dict[str, Any] = {"before": correct(wb, 256, asked.seed)}
        if asked.count:
            found["old tasks before"] = evaluate(wb.model, wb.processor, 57, asked.count)
        wall, cpu = time.monotonic(), time.process_time()
        result = learn(wb, data, asked.steps, asked.rate)
        found |= {"seconds": time.monotonic() - wall, "cpu seconds": time.process_time() - cpu, "result": repr(result)}
        found["after"] = correct(wb, 256, asked.seed)
        if asked.count:
            found["old tasks after"] = evaluate(wb.model, wb.processor, 57, asked.count)
    text = json.dumps(found, indent=1)
    if asked.json is not None:
        asked.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
