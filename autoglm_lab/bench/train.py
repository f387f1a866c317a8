"""One step of fine-tuning with adapters: peak over weights and adapters, and time. Ours against the Trainer's."""
# peft and the Trainer are partly annotated.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from autoglm_lab.bench import train_nf4
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.models.decoder_layers import decoder_layers, linear_layers
from autoglm_lab.schedule import spread
from autoglm_lab.training.adapters import Adapters
from autoglm_lab.training.examples import Examples
from autoglm_lab.training.settings import StepSettings
from autoglm_lab.training.step import Step

_RANK = 16
_MOST = 2_500_000_000
_SLOWER, _SLOWER_OFFLOADED = 1.55, 1.35
# Layers whose activations go to the host instead of being computed again.
_OFFLOADED = 0.3


@dataclass(frozen=True)
class Cost:
    """One step.

    Attributes:
        seconds: optimiser included, the median after two that warm up.
        over: bytes that torch's allocator gave out at most, less what it had with the adapters alone; None on a CPU.
        moved: bytes of activations that a step brought to the host.
    """

    seconds: float
    over: int | None
    moved: int = 0


def run(bench: Bench) -> Report:
    """The same tokens and adapters through each way of keeping activations."""
    wb = bench.workbench
    tokens, times = (64, 3) if bench.small else (2048, 5)
    vocabulary = int(wb.model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = {name: one.requires_grad for name, one in wb.model.named_parameters()}
    try:
        found = wb.engine.occupy(lambda _between: _costs(bench, wb, ids, times)).result()
    finally:
        for name, one in wb.model.named_parameters():
            one.requires_grad_(asked[name])
    return _report(bench, tokens, found, *train_nf4.figures(bench, tokens))


def _costs(bench: Bench, wb: Any, ids: Sequence[int], times: int) -> dict[str, Cost]:
    wb.model.requires_grad_(False)
    layers = len(decoder_layers(wb.model))
    every = frozenset(range(layers))
    settings = {
        "nothing computed again": StepSettings(layers, micro_batch=1),
        "every layer computed again": StepSettings(layers, every, micro_batch=1),
        "partly offloaded": StepSettings(layers, every - spread(layers, _OFFLOADED), offload=1.0, micro_batch=1),
    }
    costs: dict[str, Cost] = {}
    with torch.inference_mode(mode=False), torch.enable_grad():
        for name, one in settings.items():
            bench.say(f"ours, {name}")
            costs[name] = ours(bench, wb, ids, one, times)
        for name, checkpointing in {"Trainer": False, "Trainer, checkpointing": True}.items():
            bench.say(name)
            costs[name] = stock(bench, wb, ids, times, checkpointing=checkpointing)
    return costs


def ours(bench: Bench, wb: Any, ids: Sequence[int], settings: StepSettings, times: int) -> Cost:
    """A step of ours."""
    adapters = Adapters(wb.model)
    adapters.add("bench", rank=_RANK, alpha=2 * _RANK)
    learnt = list(adapters.parameters("bench").values())
    for weight in learnt:
        weight.requires_grad_(True)
    examples = Examples(wb.model, wb.processor, None)
    step = Step(wb.model, examples, settings)
    example = examples.of_tokens(ids)
    optimizer = torch.optim.AdamW(learnt, lr=1e-4)

    def once() -> None:
        step.run([example])
        optimizer.step()
        optimizer.zero_grad()

    try:
        cost = _measured(bench, once, times)
        return Cost(cost.seconds, cost.over, step.layers.store.moved // (times + 2))
    finally:
        adapters.remove()


def stock(bench: Bench, wb: Any, ids: Sequence[int], times: int, *, checkpointing: bool) -> Cost:
    """A step of transformers' Trainer over peft, as people write it."""
    config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=linear_layers(wb.model))
    with warnings.catch_warnings(), TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        model = get_peft_model(wb.model, config)
        half = wb.model.dtype == torch.bfloat16
        told = TrainingArguments(
            output_dir=str(Path(folder)),
            per_device_train_batch_size=1,
            max_steps=times + 2,
            gradient_checkpointing=checkpointing,
            bf16=half,
            use_cpu=not bench.cuda,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        told._n_gpu = min(1, told.n_gpu)  # noqa: SLF001 - as many copies as GPUs otherwise
        row = {"input_ids": list(ids), "labels": list(ids), "attention_mask": [1] * len(ids)}
        clock = _Clock(bench)
        trainer = Trainer(
            model,
            told,
            train_dataset=[row] * (times + 2),
            data_collator=_tensors,
            callbacks=[clock],
        )
        try:
            trainer.train()
        finally:
            if checkpointing:
                wb.model.gradient_checkpointing_disable()
            model.unload()
            wb.model.eval()
            vars(wb.model).pop("peft_config", None)
            wb.model.disable_input_require_grads()
            del trainer, model
    gc.collect()
    return Cost(median(clock.seconds[2:]), clock.over)


class _Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Seconds of each step, and the peak of them all."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._start, self._before = bench, 0.0, 0
        self.seconds: list[float] = []
        self.over: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        del args, state, control, named
        self._before = _open_peak(self._bench)

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        del args, state, control, named
        self._bench.synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        del args, state, control, named
        self._bench.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self.over = _close_peak(self._bench, self._before)


def _measured(bench: Bench, once: Callable[[], None], times: int) -> Cost:
    before = _open_peak(bench)
    seconds = [bench.timed(once) for _ in range(times + 2)]
    return Cost(median(seconds[2:]), _close_peak(bench, before))


def _open_peak(bench: Bench) -> int:
    if not bench.cuda:
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    return torch.cuda.memory_allocated(bench.device)


def _close_peak(bench: Bench, before: int) -> int | None:
    return torch.cuda.max_memory_allocated(bench.device) - before if bench.cuda else None


def _tensors(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _report(bench: Bench, tokens: int, found: dict[str, Cost], on_nf4: list[Figure], how_nf4: str) -> Report:
    plain = found["Trainer"].seconds
    peers = {"Trainer": found["Trainer"], "Trainer, checkpointing": found["Trainer, checkpointing"]}
    bars = {"every layer computed again": _SLOWER, "partly offloaded": _SLOWER_OFFLOADED}
    figures: list[Figure] = []
    for name in ("nothing computed again", "every layer computed again", "partly offloaded"):
        cost, bar = found[name], bars.get(name)
        limited = name == "every layer computed again"
        meets = None if cost.over is None or not limited else bench.judge(cost.over <= _MOST)
        figures.append(
            Figure(
                f"{name}: peak over weights and adapters", "B", cost.over,
                {peer: one.over for peer, one in peers.items()},
                bar="<= 2.5 GB" if limited else "", meets=meets,
            )
        )  # fmt: skip
        figures.append(
            Figure(
                f"{name}: a step", "s", cost.seconds, {peer: one.seconds for peer, one in peers.items()},
                bar=f"<= {bar} x Trainer without" if bar else "",
                meets=None if bar is None else bench.judge(cost.seconds <= bar * plain),
            )
        )  # fmt: skip
        if cost.moved:
            figures.append(Figure(f"{name}: activations to the host a step", "B", cost.moved, {}))
    return bench.report(
        "train",
        [*figures, *on_nf4],
        f"{tokens:,} tokens, one dialogue, every token learnt; adapters of rank {_RANK} on every linear layer of the "
        "text module, AdamW; the median of the steps after two.",
        "Peak: what torch's allocator gave out at most, less what it had with the adapters alone: gradients, states of "
        "the optimiser and activations. The weights lie elsewhere, on both sides.",
        "Trainer: transformers' own over peft, as bf16=True has it; with checkpointing, gradient_checkpointing=True.",
        how_nf4,
    )
