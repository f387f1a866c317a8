"""The last words of a conversation: what they attend to tells which of its tokens it can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoglm_lab.engine.positions import Places
from autoglm_lab.engine.prompt import Prompt


@dataclass(frozen=True)
class Question:
    """Some words, and where they stand.

    Attributes:
        ids: token ids, ``[words]``.
        positions: ``[1, words]``, or ``[3, 1, words]`` for time, rows and columns.
        end: tokens of the conversation up to the last of them.
    """

    ids: tuple[int, ...]
    positions: Tensor
    end: int

    @classmethod
    def of(cls, prompt: Prompt, places: Places, count: int) -> Question:
        """The last ``count`` words of a prompt; images and sounds ask nothing."""
        media = {at for run in prompt.runs for at in range(run.start, run.end)}
        words = [at for at in range(len(prompt.ids)) if at not in media][-count:]
        return cls(tuple(prompt.ids[at] for at in words), places.ids[..., torch.tensor(words)], len(prompt.ids))

    def then(self, ids: Sequence[int], delta: int, count: int) -> Question:
        """The last ``count`` words of a conversation ``ids`` that this ended and an answer followed.

        Args:
            delta: what a position has above the count of tokens.
        """
        if len(ids) <= self.end:
            return self
        first = max(self.end, len(ids) - count)
        answer = torch.arange(first, len(ids)) + delta
        positions = torch.cat([self.positions, answer.expand(*self.positions.shape[:-1], -1)], dim=-1)
        return Question((*self.ids, *ids[first:])[-count:], positions[..., -count:], len(ids))
