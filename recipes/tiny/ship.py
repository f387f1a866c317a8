"""Put weights into the package: `python -m recipes.tiny.ship CHECKPOINT[:SHARE] ...`.

Several checkpoints of one line of runs are averaged by their shares, which costs nothing at inference and generalises
better than the last one alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from autoglm_lab.models.autoglm import AutoGlmForConditionalGeneration
from recipes.tiny.architecture import tiny_config
from recipes.tiny.train import WEIGHTS, load_weights

LIMIT = 12_000_000


def average(shares: Mapping[Path, float]) -> dict[str, torch.Tensor]:
    """The weighted mean of checkpoints, in bfloat16.

    Raises:
        ValueError: The shares do not add up to 1.
    """
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"the shares add up to {sum(shares.values())}, not to 1")
    parts = [(load_file(path), share) for path, share in shares.items()]
    names = parts[0][0]
    return {name: sum(share * part[name].float() for part, share in parts).to(torch.bfloat16) for name in names}


def ship(checkpoint: Path, folder: Path = WEIGHTS) -> int:
    """Write config and weights in bfloat16 beside the processor's files; returns the bytes of the weights.

    Raises:
        ValueError: The weights are larger than the package allows.
    """
    model = AutoGlmForConditionalGeneration(tiny_config()).to(torch.bfloat16)
    load_weights(model, checkpoint)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    file.chmod(0o644)
    if file.stat().st_size > LIMIT:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, more than {LIMIT}")
    return file.stat().st_size


def main(arguments: list[str]) -> None:
    """The command."""
    named = [argument.rpartition(":") for argument in arguments if ":" in argument]
    if not named:
        (only,) = arguments
        print(ship(Path(only)))
        return
    mean = Path(named[0][0]).with_name("average.safetensors")
    save_file(average({Path(path): float(share) for path, _, share in named}), mean, {"format": "pt"})
    print(ship(mean))


if __name__ == "__main__":
    main(sys.argv[1:])
