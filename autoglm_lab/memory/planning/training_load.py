"""What a training asks for, as a plan takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TrainingLoad:
    """One kind of training; how many dialogues go through together and what layers keep stands in the policy.

    Attributes:
        method: ``lora``: low-rank adapters on every linear layer of the decoder; ``full``: the weights of the text.
        tokens: of the longest dialogue, its answer included.
        rank: of the adapters.

    Raises:
        ValueError: a figure cannot be.
    """

    method: Literal["lora", "full"] = "lora"
    tokens: int = 2048
    rank: int = 16

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise ValueError(f"there is no method '{self.method}' of fine-tuning: use 'lora' or 'full'")
        if self.tokens < 2 or self.rank < 1:
            raise ValueError("a dialogue has at least 2 tokens, and an adapter at least rank 1")

    def __str__(self) -> str:
        what = f"adapters of rank {self.rank}" if self.method == "lora" else "all weights of the text"
        return f"fine-tuning {what} on dialogues of {self.tokens:,} tokens"
