"""The peer that every bench has: the same weights in plain transformers, with nothing of ours around them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from autoglm_lab.engine.messages import read_messages
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.workbench import Workbench


class Stock:
    """A second model on the weights of a workbench: its own modules, cache and attention, no second copy of weights.

    Every module of the workbench has to be on the device, and to stay there.

    Args:
        attention: transformers' implementation, ``sdpa`` or ``eager``.
    """

    def __init__(self, workbench: Workbench, attention: str = "sdpa") -> None:
        ours: Any = workbench.model
        self.processor, self.device = workbench.processor, ours.device
        self.model: Any = skeleton(ours.config, ours.dtype)
        self.model.load_state_dict(ours.state_dict(), assign=True)
        self.model.to(self.device)
        self.model.generation_config = ours.generation_config
        self.model.set_attn_implementation(attention)
        self._base = 0
        self.release()

    def batch(self, messages: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A dialogue as the model takes it, on the device."""
        return batch_of(self.processor, self.model, messages)

    @torch.no_grad()
    def read(self, batch: dict[str, Tensor], cache: DynamicCache | None = None) -> tuple[Tensor, DynamicCache]:
        """Logits ``[vocab]`` after the last token, and the cache."""
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        logits = self.model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1].float(), cache

    @torch.no_grad()
    def follow(self, ids: Sequence[int], cache: DynamicCache) -> Tensor:
        """Logits ``[vocab]`` after ``ids``, read behind what the cache holds."""
        mask = torch.ones((1, cache.get_seq_length() + len(ids)), dtype=torch.long, device=self.device)
        given = torch.tensor([list(ids)], device=self.device)
        logits: Tensor = self.model(
            input_ids=given, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits[0, -1].float()

    def first_token(self, messages: Sequence[dict[str, Any]]) -> tuple[float, int | None]:
        """Seconds from the dialogue to its first token, and the most bytes that torch's allocator held for it, over
        what it held at the last `release`; None on a CPU.
        """
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        logits, cache = self.read(self.batch(messages))
        int(logits.argmax())
        seconds = time.perf_counter() - start
        del cache
        return seconds, torch.cuda.max_memory_reserved(self.device) - self._base if cuda else None

    def release(self) -> None:
        """Give back what torch's allocator caches, and count peaks from there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            self._base = torch.cuda.memory_reserved(self.device)

    def generate(self, batch: dict[str, Tensor], count: int, least: int | None = None) -> Tensor:
        """Greedy tokens ``[batch, count]``; less than ``count`` only where ``least`` is given and all rows ended."""
        least = count if least is None else least
        ids: Tensor = self.model.generate(**batch, do_sample=False, min_new_tokens=least, max_new_tokens=count)
        return ids[:, batch["input_ids"].shape[1] :]

    def decode_rate(self, batch: dict[str, Tensor], count: int) -> float:
        """Tokens a second of ``generate`` over all rows, the prompt's own time taken off."""
        self.generate(batch, 2)
        seconds = []
        for tokens in (1, count):
            start = time.perf_counter()
            self.generate(batch, tokens)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        rows = int(batch["input_ids"].shape[0])
        return rows * (count - 1) / (seconds[1] - seconds[0])


def batch_of(processor: Any, model: Any, messages: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A dialogue as a model takes it, on the model's device and in its dtype."""
    rendered = processor.apply_chat_template(
        [message.for_processor() for message in read_messages(messages)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        enable_thinking=False,
    )
    moved = {name: value.to(model.device) for name, value in rendered.items()}
    return {name: one.to(model.dtype) if one.is_floating_point() else one for name, one in moved.items()}
