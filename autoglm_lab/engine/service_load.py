"""`ServiceLoad`: how busy a server is, as far as its metrics tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ServiceLoad:
    """What a server's metrics tell; None: it does not tell.

    Attributes:
        kv_share: share of its KV cache that is in use, 0 to 1.
        kv_capacity: tokens that its KV cache holds.
        kv_tokens: tokens in use.
        running: requests that it answers now.
        waiting: requests that wait.
        prefix_hits: share of the prompt tokens since its start that it found in its cache, 0 to 1.
    """

    kv_share: float | None = None
    kv_capacity: int | None = None
    kv_tokens: int | None = None
    running: int | None = None
    waiting: int | None = None
    prefix_hits: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.kv_share is not None:
            of = f" of {self.kv_capacity:,} tokens" if self.kv_capacity else ""
            parts.append(f"{100 * self.kv_share:.0f} %{of} in use")
        if self.running is not None:
            waiting = "" if self.waiting is None else f", {self.waiting} waiting"
            parts.append(f"{self.running} running{waiting}")
        if self.prefix_hits is not None:
            parts.append(f"{100 * self.prefix_hits:.0f} % of prompts found in its cache")
        return "; ".join(parts)


def vllm_load(text: str) -> ServiceLoad:
    """From vLLM's /metrics."""
    found = _Samples(text)
    blocks = found.label("vllm:cache_config_info", "num_gpu_blocks")
    size = found.label("vllm:cache_config_info", "block_size")
    share = found.mean("vllm:kv_cache_usage_perc")
    capacity = None if blocks is None or size is None else blocks * size
    return ServiceLoad(
        kv_share=share,
        kv_capacity=capacity,
        kv_tokens=None if share is None or capacity is None else round(share * capacity),
        running=found.count("vllm:num_requests_running"),
        waiting=found.count("vllm:num_requests_waiting"),
        prefix_hits=_ratio(found.count("vllm:prefix_cache_hits_total"), found.count("vllm:prefix_cache_queries_total")),
    )


def sglang_load(text: str) -> ServiceLoad:
    """From SGLang's /metrics, which it has with --enable-metrics."""
    found = _Samples(text)
    return ServiceLoad(
        kv_share=found.mean("sglang:token_usage"),
        kv_capacity=found.count("sglang:max_total_num_tokens"),
        kv_tokens=found.count("sglang:num_used_tokens"),
        running=found.count("sglang:num_running_reqs"),
        waiting=found.count("sglang:num_queue_reqs"),
        prefix_hits=found.mean("sglang:cache_hit_rate"),
    )


def llama_load(text: str, slots: Any) -> ServiceLoad:
    """From llama-server's /metrics (with --metrics) and /slots (with --slots); either may be missing."""
    found = _Samples(text)
    known = [slot for slot in slots if isinstance(slot, Mapping)] if isinstance(slots, list) else []
    capacity = _total(known, lambda slot: slot.get("n_ctx"))
    # What a slot holds stood in n_past once; one that never was asked has neither.
    used = _total(known, lambda slot: slot.get("n_past", slot.get("n_prompt_tokens", 0)))
    found_tokens, read_tokens = (found.count(f"llamacpp:prompt_tokens{name}_total") for name in ("_cached", ""))
    running = found.count("llamacpp:requests_processing")
    if running is None and known:
        running = sum(bool(slot.get("is_processing")) for slot in known)
    return ServiceLoad(
        kv_share=_ratio(used, capacity),
        kv_capacity=capacity,
        kv_tokens=used,
        running=running,
        waiting=found.count("llamacpp:requests_deferred"),
        prefix_hits=_ratio(found_tokens, (found_tokens or 0) + (read_tokens or 0)),
    )


class _Samples:
    """The samples of a Prometheus text, by name; a text that is none has no samples."""

    def __init__(self, text: str) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self._by_name: dict[str, list[Any]] = {}
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    # SGLang repeats a total for each priority.
                    if not sample.labels.get("priority"):
                        self._by_name.setdefault(sample.name, []).append(sample)
        except ValueError:
            self._by_name.clear()

    def count(self, name: str) -> int | None:
        """The sum over engines and models."""
        found = self._by_name.get(name)
        return None if not found else round(sum(sample.value for sample in found))

    def mean(self, name: str) -> float | None:
        found = self._by_name.get(name)
        return None if not found else sum(sample.value for sample in found) / len(found)

    def label(self, name: str, label: str) -> int | None:
        """The sum of a number that stands in a label."""
        texts = [str(sample.labels.get(label, "")) for sample in self._by_name.get(name, ())]
        numbers = [int(text) for text in texts if text.isdecimal()]
        return sum(numbers) if numbers and label != "block_size" else next(iter(numbers), None)


def _total(slots: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], Any]) -> int | None:
    numbers = [read(slot) for slot in slots]
    return sum(numbers) if numbers and all(isinstance(number, int) for number in numbers) else None


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None
