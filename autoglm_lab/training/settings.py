"""How one training step spends memory, and what to turn when it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoglm_lab.policy import TrainingPolicy
from autoglm_lab.schedule import Keeping, keepings, recomputed

LEAST_CHUNK = 64


@dataclass(frozen=True)
class StepSettings:
    """What a step keeps and how it is cut.

    Attributes:
        layers: of the decoder.
        recompute: layers that keep their input alone.
        offload: share of what is kept that waits on the host.
        loss_chunk: tokens whose logits exist together.
        micro_batch: dialogues that go through the model together.
    """

    layers: int
    recompute: frozenset[int] = frozenset()
    offload: float = 0.0
    loss_chunk: int = 256
    micro_batch: int = 4

    @classmethod
    def of(cls, policy: TrainingPolicy, layers: int, recompute: frozenset[int] | None = None) -> StepSettings:
        """As the policy says; ``auto`` begins with ``recompute``, nothing where none is given."""
        if policy.checkpointing == "auto":
            chosen = recompute or frozenset()
        else:
            chosen = recomputed(layers, policy.checkpointing, policy.every)
        return cls(layers, chosen, policy.offload, policy.loss_chunk, policy.micro_batch)

    @property
    def keepings(self) -> tuple[Keeping, ...]:
        """What each layer keeps."""
        return keepings(self.layers, self.recompute, self.offload)

    def stronger(self) -> StepSettings | None:
        """The next settings that need less memory and compute the same; None: there are none.

        First every other layer is computed again, then every layer; then the loss is cut smaller, a micro-batch holds
        half as many dialogues, and what is kept goes to the host.
        """
        half, every = recomputed(self.layers, "every-k", 2), recomputed(self.layers, "every-layer", 1)
        if len(self.recompute) < len(half):
            return replace(self, recompute=half)
        if self.recompute != every:
            return replace(self, recompute=every)
        if self.loss_chunk > LEAST_CHUNK:
            return replace(self, loss_chunk=max(LEAST_CHUNK, self.loss_chunk // 4))
        if self.micro_batch > 1:
            return replace(self, micro_batch=self.micro_batch // 2)
        if self.offload < 1 and self.layers:
            return replace(self, offload=1.0)
        return None

    def __str__(self) -> str:
        parts = [f"{len(self.recompute)} of {self.layers} layers computed again"]
        parts.append(f"micro-batches of {self.micro_batch}")
        parts += [f"{self.offload:.0%} of what is kept on the host"] if self.offload else []
        return ", ".join([*parts, f"the loss {self.loss_chunk} tokens at a time"])
