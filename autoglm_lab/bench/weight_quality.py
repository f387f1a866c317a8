"""What quantised weights cost: right answers of the embedded model, perplexity of SmolLM2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from autoglm_lab.bench import perplexity as texts
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.heldout import Outcome, Recipe, answered
from autoglm_lab.bench.report import Figure
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.loading import outline
from autoglm_lab.opening import load
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.workbench import Workbench

MODULES = {"int8": ("vision", "audio", "projector", "text", "head"), "int4": ("text",)}
"""The modules whose weights are kept so: all in 8 bits; in 4 bits the text, whose layers are most of the bytes."""
_NOTE = (
    "Weights: in int8 every module of the model, in int4 the linear layers of the text (embeddings, and a head that "
    "shares them, in int8)."
)


def quantised(source: str, precision: str, policy: MemoryPolicy, device: str) -> Workbench:
    """A model in float32 whose weights are kept in ``precision``, under ``policy``."""
    names = [spec.name for spec in anatomy(outline(source, device="cpu").model) if spec.name in MODULES[precision]]
    wb = load(source, dtype="float32", device=device, quantize=dict.fromkeys(names, precision))
    wb.policy = policy.replace(modules={name: {"precision": precision} for name in names})
    return wb


def answers(bench: Bench, recipe: Recipe, task: str, exact: Outcome, dialogues: Sequence[object]) -> list[Figure]:
    """Held-out dialogues of one task with quantised weights, beside the model's own."""
    figures = []
    for precision in ("int4",) if bench.small else MODULES:
        bench.say(f"{task}: weights in {precision}")
        with quantised("autoglm-tiny", precision, bench.exact.policy, str(bench.device)) as wb:
            outcome = answered(wb, recipe, list(dialogues))
        name = f"{task}, weights in {precision}: right"
        figures.append(Figure(name, "%", outcome.share, {"as the model": exact.share}, interval=outcome.interval))
    return figures


def perplexities(
    bench: Bench, policy: MemoryPolicy, contexts: Sequence[tuple[int, ...]], exact: list[Tensor]
) -> tuple[list[Figure], str]:
    """How much higher SmolLM2's perplexity is with quantised weights, and how they were kept."""
    figures = []
    for precision in MODULES:
        bench.say(f"perplexity: weights in {precision}")
        with quantised(str(bench.smollm2), precision, policy, str(bench.device)) as wb:
            costs = [texts.losses(wb, ids) for ids in contexts]
        more, interval = texts.change(costs, exact)
        name = f"SmolLM2's perplexity, weights in {precision}: higher by"
        figures.append(Figure(name, "%", more, interval=interval))
    return figures, _NOTE
