"""Train autoglm-tiny: `python -m recipes.tiny.train --out DIR [--minutes 8.7] [--resume FILE]`.

One process on one GPU, data made by worker processes meanwhile. A step sums the gradients of one batch of each group;
on CUDA each group's forward and backward is a captured graph. The schedule follows the clock, so that a run ends when
it should. Checkpoints are the weights in bfloat16 (under 12 MB); the optimiser's state starts anew when resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from autoglm_lab.models.autoglm import AutoGlmForConditionalGeneration
from recipes.tiny.architecture import tiny_config
from recipes.tiny.group_step import GroupStep
from recipes.tiny.losses import LogMel, Losses, slim_norms
from recipes.tiny.optimizer import Muon, split_parameters
from recipes.tiny.stream import SampleStream

WEIGHTS: Final = Path(__file__).parents[2] / "autoglm_lab/models/weights/autoglm-tiny"


def rate_factor(fraction: float) -> float:
    """Learning rate by the share of time gone: a short rise, flat, then down to zero over the last 60 %."""
    return min(1.0, fraction / 0.02) * min(1.0, max(0.0, (1 - fraction) / 0.6))


def load_weights(model: AutoGlmForConditionalGeneration, path: Path) -> None:
    """Weights of a checkpoint, or of a folder such as the shipped one, whose names transformers maps.

    Raises:
        ValueError: The names do not fit.
    """
    weights = AutoGlmForConditionalGeneration.from_pretrained(path).state_dict() if path.is_dir() else load_file(path)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{path} does not fit the model: missing {missing[:3]}…, unexpected {unexpected[:3]}…")


class Training:
    """Model, optimisers, data and what has been logged of one run.

    Args:
        out: Folder for model.safetensors, checkpoint.safetensors and log.json.
        device: Where to train.
        workers: Processes that make data.
        seed: Of initialisation and data.
        resume: Weights to start from: a checkpoint, or a folder with a model.
        lr: Peak learning rate of Muon; AdamW's is 0.6 of it.
        side: Weight of the side tasks.
        divide: Divides batches, and by its square the rings, for a small machine.
        favour: Name of a group; the others then run a quarter as often.
    """

    def __init__(
        self, out: Path, device: torch.device, *, workers: int, seed: int, resume: Path | None, lr: float, side: float,
        divide: int = 1, favour: str | None = None,
    ) -> None:  # fmt: skip
        self.began, self.out, self.device, self.lr, self.step = time.monotonic(), out, device, lr, 0
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        self.stream = SampleStream(str(WEIGHTS), device, workers, seed, divide**2)
        config = tiny_config()
        config.dtype = torch.float32
        self.model = AutoGlmForConditionalGeneration(config).float().to(device).train()
        if resume is not None:
            load_weights(self.model, resume)
        slim_norms(self.model)
        self.losses = Losses(self.model).to(device)
        front_end = LogMel(AutoProcessor.from_pretrained(WEIGHTS).feature_extractor).to(device)
        matrices, self.rest = split_parameters(self.losses)
        for parameter in self.losses.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.gradients = [p.grad for p in self.losses.parameters() if p.grad is not None]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(
            self.rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
        )
        self.averaged = [p.detach().clone() for p in self.model.parameters()]
        self.stream.wait(256)
        self.units = [
            GroupStep(self.losses, front_end, ring, max(1, ring.group.batch // divide), side)
            for ring in self.stream.rings
        ]
        for unit in self.units:
            unit.every = unit.group.every * (1 if favour in (None, unit.group.name) else 4)
        if device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            for unit in self.units:
                with self.stream.copying:
                    unit.capture(pool)
                print(f"{unit.group.name}: {unit.milliseconds():.1f} ms", flush=True)
        self.log: list[dict[str, Any]] = []
        print(f"ready after {self.seconds():.1f} s", flush=True)

    def seconds(self) -> float:
        """Since the run began, preparation included."""
        return time.monotonic() - self.began

    def run(self, minutes: float, steps: int | None = None) -> AutoGlmForConditionalGeneration:
        """Train until `minutes` after the beginning, or for `steps`; returns the averaged model as it is shipped."""
        started, spoke = self.seconds(), self.seconds()
        span = minutes * 60 - started
        while (fraction := (self.seconds() - started) / span if steps is None else self.step / steps) < 1:
            self._step(self.lr * rate_factor(fraction))
            if self.step % 50 == 0 and self.device.type == "cuda":
                # Keeps the queue of launched work, and with it the clock, honest.
                torch.cuda.synchronize()
            if self.seconds() - spoke > 10:
                spoke = self.seconds()
                self._report()
        self.stream.close()
        with torch.no_grad():
            for parameter, average in zip(self.model.parameters(), self.averaged, strict=True):
                parameter.copy_(average.to(torch.bfloat16))
        self._save("model.safetensors")
        return self.model.eval()

    def _step(self, rate: float) -> None:
        torch._foreach_zero_(self.gradients)
        for offset, unit in enumerate(self.units):
            if (self.step + offset) % unit.every == 0:
                unit.run()
        torch.nn.utils.clip_grad_norm_(self.rest, 2.0, foreach=True)
        for settings in self.adam.param_groups:
            settings["lr"] = rate * 0.6
        self.adam.step()
        self.muon.step(rate)
        keep = min(0.997, self.step / (self.step + 20))
        torch._foreach_lerp_(self.averaged, [p.detach() for p in self.model.parameters()], 1 - keep)
        self.step += 1

    def _report(self) -> None:
        found = {unit.group.name: [round(float(v), 4) for v in unit.outputs] for unit in self.units}
        seen = {u.group.name: round(self.step * u.batch / u.every / u.ring.written, 2) for u in self.units}
        self.log.append({"seconds": round(self.seconds()), "step": self.step, "losses": found, "passes": seen})
        print(f"{self.seconds():5.0f} s step {self.step:5d} {found}", flush=True)
        (self.out / "log.json").write_text(json.dumps(self.log))
        if len(self.log) % 9 == 0:
            self._save("checkpoint.safetensors")

    def _save(self, name: str) -> None:
        """Averaged weights in bfloat16, tied ones once."""
        names = [name for name, _ in self.model.named_parameters()]
        weights = {n: w.to(torch.bfloat16).cpu().contiguous() for n, w in zip(names, self.averaged, strict=True)}
        save_file(weights, self.out / name, {"format": "pt"})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--side", type=float, default=0.5, help="weight of the side tasks: less when resuming")
    parser.add_argument("--divide", type=int, default=1, help="divides batches, for a small machine")
    parser.add_argument("--favour", help="a group: the others run a quarter as often")
    asked = parser.parse_args()
    training = Training(
        asked.out, torch.device(asked.device), workers=asked.workers, seed=asked.seed, resume=asked.resume,
        lr=asked.lr, side=asked.side, divide=asked.divide, favour=asked.favour,
    )  # fmt: skip
    training.run(asked.minutes)


if __name__ == "__main__":
    main()
