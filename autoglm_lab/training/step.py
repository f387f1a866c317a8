"""One step of training: forward and backward over its dialogues, cut so that it fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoglm_lab.models.chunked_loss import IGNORED, next_token_loss
from autoglm_lab.models.decoder_layers import core_of
from autoglm_lab.models.float32_attention import Float32Attention
from autoglm_lab.models.precision import dtype_of
from autoglm_lab.training.examples import Example, Examples
from autoglm_lab.training.layers import Layers
from autoglm_lab.training.settings import StepSettings

Marker = Callable[[str], None]


class Step:
    """Adds the gradients of some dialogues to the weights that learn.

    However the dialogues are cut into micro-batches, the loss is the mean over all of their labels.

    Args:
        examples: makes the model's inputs.
        settings: to begin with.
        mark: told ``forward`` and ``backward`` as they begin.
    """

    def __init__(self, model: Any, examples: Examples, settings: StepSettings, mark: Marker | None = None) -> None:
        self._model, self._examples = model, examples
        self._mark: Marker = mark or (lambda _: None)
        self.layers = Layers(model)
        self.settings = settings
        self._core = core_of(model)
        self._device = next(model.parameters()).device
        dtype = dtype_of(model, None)
        self._half = dtype if dtype in (torch.bfloat16, torch.float16) else None

    def run(self, dialogues: Sequence[Example]) -> Tensor:
        """Forward and backward over ``dialogues``; the mean loss of their labels, detached."""
        self.layers.keepings = self.settings.keepings
        count = sum(one.targets for one in dialogues)
        total = torch.zeros((), device=self._device)
        # Those of like length together: less padding.
        order = sorted(dialogues, key=len, reverse=True)
        size = self.settings.micro_batch
        for start in range(0, len(order), size):
            with self.layers.active(), self._attention():
                self._mark("forward")
                loss = self.loss(self._examples.batch(order[start : start + size], self._device), count)
                self._mark("backward")
                loss.backward()
            total += loss.detach()
            del loss
        return total

    @torch.no_grad()
    def look(self, dialogue: Example) -> None:
        """One dialogue through the layers, and nothing else."""
        with self._attention():
            self._forward(self._examples.batch([dialogue], self._device))

    def loss(self, batch: Mapping[str, Any], count: int) -> Tensor:
        """The summed loss of one micro-batch's labels over ``count``."""
        made, labels = self._forward(batch), batch["labels"]
        if self._core is not None:
            return next_token_loss(made, labels, self._core[1], chunk=self.settings.loss_chunk, count=count)
        flat = made[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum") / max(count, 1)

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        """Layers that are computed again in the backward pass must do what they did before: it is for both."""
        half = self._half is not None and self._device.type == "cpu"
        return Float32Attention() if half else contextlib.nullcontext()

    def _forward(self, batch: Mapping[str, Any]) -> Tensor:
        """What the head is given ``[batch, seq, hidden]``, or logits where it cannot be told from the model."""
        given = {name: value for name, value in batch.items() if name != "labels"}
        half = torch.autocast(self._device.type, self._half) if self._half is not None else contextlib.nullcontext()
        with half:
            if self._core is not None:
                made: Tensor = self._core[0](**given, use_cache=False, return_dict=True).last_hidden_state
            else:
                made = self._model(**given, use_cache=False, return_dict=True).logits
        return made
