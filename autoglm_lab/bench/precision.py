"""Decoding with weights in 8 and 4 bits, or half of them, and what the process takes then."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.limits import read_rate, seconds_of
from autoglm_lab.bench.prompts import prompt_of
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.models.quantized_products import Packed, product, why_not
from autoglm_lab.models.sparse_format import SparseFormat
from autoglm_lab.models.weight_format import WeightFormat
from autoglm_lab.opening import load
from autoglm_lab.units import GiB
from autoglm_lab.workbench import Workbench

PRECISIONS = ("model", "int8", "int4", "2:4")
_MOST = {"int8": 12.0 * GiB, "int4": 8.0 * GiB}
_FASTER = {"int8": 1.0, "int4": 1.3}

_HOW = (
    "Decoding: from the first to the last token after a short prompt, captured steps where there is a GPU; vision is "
    "parked. Its limit: the weights of the layers and the head read once a step, at the rate at which one large matrix "
    "of the model's own precision is read to be multiplied with a vector, measured in this run."
)


def run(bench: Bench) -> Report:
    """Tokens a second and bytes of the process for each precision, and how fast single products read their weights."""
    bench.close()  # one model at a time
    figures: list[Figure] = []
    rate = read_rate(bench.device, torch.bfloat16 if bench.cuda else torch.float32)
    base: dict[int, float] = {}
    for precision in PRECISIONS:
        with _loaded(bench, precision) as wb:
            figures += _of_one(bench, wb, precision, base, rate)
        gc.collect()
    figures += _products(bench, rate)
    notes = [
        _HOW,
        "The process: what the driver reports after decoding, a prompt of 8,192 tokens and a reclaim.",
        "int8: text and head; int4: the text, with embeddings and head in int8; 2:4: the layers of the text.",
    ]
    if why_not():
        notes.append(f"The kernels could not be used: {why_not()}.")
    return bench.report("weights in fewer bits", figures, *notes)


@contextlib.contextmanager
def _loaded(bench: Bench, precision: str) -> Iterator[Workbench]:
    name = "autoglm-tiny" if bench.small else "autoglm-phone-9b"
    bench.say(f"loading {name}, weights in {precision}")
    quantize = {"model": None, "2:4": {"text": "2:4"}}.get(precision, precision)
    weights = None if bench.small else "dummy"
    with load(name, weights=weights, device=str(bench.device), quantize=quantize) as wb:
        wb.policy = wb.policy.replace(
            reclaim={"every_answers": None, "cached_share": None}, generation={"eos": False}, kv={"prefix_bytes": 0}
        )
        wb.modules["vision"].park().result()
        yield wb


def _of_one(bench: Bench, wb: Workbench, precision: str, base: dict[int, float], rate: float) -> list[Figure]:
    read = _bytes_read(wb)
    figures = []
    for rows in (1, 4):
        bench.say(f"decoding {rows} with weights in {precision}")
        speed = _decode(bench, wb, rows)
        base.setdefault(rows, speed)
        faster = _FASTER.get(precision)
        judged = faster is not None and rows == 1
        figures.append(
            Figure(
                f"decoding, batch {rows}, weights in {precision}",
                "tokens/s",
                speed,
                {} if precision == "model" else {"as the model": base[rows]},
                limit=rows * rate / read,
                bar=f">= {faster:g} x as the model" if judged else "",
                meets=bench.judge(speed >= (faster or 0) * base[rows]) if judged else None,
            )
        )
    wb.chat(prompt_of(wb, 64 if bench.small else 8192, seed=3), conversation="long", max_new_tokens=2).result(600)
    wb.drop("long")
    wb.reclaim()
    ledger, most = wb.memory, _MOST.get(precision)
    held = float(ledger.process or 0) or None
    weights = sum(row.nbytes or 0 for row in ledger.on("device") if row.kind == "weights")
    figures.append(Figure(f"weights on the device, in {precision}", "B", weights))
    figures.append(
        Figure(
            f"the process, weights in {precision}",
            "B",
            held,
            bar=f"<= {most / GiB:g} GiB" if most else "",
            meets=bench.judge(held <= most) if most and held else None,
        )
    )
    return figures


def _decode(bench: Bench, wb: Workbench, rows: int) -> float:
    """Tokens a second of some conversations together."""
    count = 9 if bench.small else 129
    names = [f"decode {number}" for number in range(rows)]
    best = 0.0
    for _ in range(2):  # the first captures, where there is something to capture
        turns = [wb.chat(f"number {name}", conversation=name, max_new_tokens=count) for name in names]
        answers = [turn.result(600) for turn in turns]
        first = max(answer.timings.first_token or 0.0 for answer in answers)
        end = min(answer.timings.total for answer in answers)
        shares = [
            (end - first) / (answer.timings.total - (answer.timings.first_token or 0.0)) * (count - 1)
            for answer in answers
        ]
        best = sum(shares) / (end - first)
        for name in names:
            wb.drop(name)
    return best


def _bytes_read(wb: Workbench) -> int:
    """Bytes of the layers and the head, which a step reads once."""
    model: Any = wb.model
    decoder = model.get_decoder()
    tensors = [*decoder.named_parameters(), *decoder.named_buffers()]
    layers = sum(one.nbytes for name, one in tensors if "layers." in name)
    head = model.get_output_embeddings()
    return int(layers + sum(one.nbytes for one in (*head.parameters(), *head.buffers())))


def _products(bench: Bench, rate: float) -> list[Figure]:
    """Single products of the shapes that a step has: bytes of weights a second, where a GPU has its kernels."""
    shapes = (
        ((256, 96),) if bench.small else ((4096, 4096), (27_392, 4096), (4096, 13_696), (256, 4096), (151_552, 4096))
    )
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    forms: list[Packed] = [WeightFormat.of(*shape, "int8") for shape in shapes]
    forms += [WeightFormat.of(*shape, "int4") for shape in shapes]
    forms += [SparseFormat(*shape, dtype) for shape in shapes]
    return [_product(bench, form, rows, dtype, rate) for form in forms for rows in (1, 4)]


def _product(bench: Bench, form: Packed, rows: int, dtype: torch.dtype, rate: float) -> Figure:
    packed = torch.zeros(form.nbytes, dtype=torch.uint8, device=bench.device)
    given = torch.randn(rows, form.columns, dtype=dtype, device=bench.device)
    weight = torch.randn(form.rows, form.columns, dtype=dtype, device=bench.device)
    # Many of them in turn, so that none is found in the GPU's cache.
    copies = [packed.clone() for _ in range(max(1, min(16, (1 << 28) // form.nbytes)) if bench.cuda else 1)]
    ours = len(copies) * form.nbytes / _captured(bench, lambda: [product(given, one, form) for one in copies])
    plain = _captured(bench, lambda: torch.nn.functional.linear(given, weight))
    peers: dict[str, float | None] = {"bytes as the model, a second": weight.nbytes / plain / 1e9}
    if isinstance(form, SparseFormat):
        peers["torch's semi-structured"] = _semi_structured(bench, form, weight, given)
    else:
        peers["torchao"] = _torchao(bench, weight, given, form.precision)
    shape = f"{form.columns:,} to {form.rows:,}"
    return Figure(f"product of {rows} with {shape} in {form.precision}", "GB/s", ours / 1e9, peers, limit=rate / 1e9)


def _captured(bench: Bench, run: Callable[[], Any]) -> float:
    """Seconds of a run; on a GPU as a captured graph, as decode steps are, so that nothing waits for Python."""
    if not bench.cuda:
        return seconds_of(bench.device, run)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return seconds_of(bench.device, graph.replay)


def _torchao(bench: Bench, weight: Tensor, given: Tensor, precision: str) -> float | None:
    """Bytes of quantised weights a second of torchao's weight-only layer; None where it is not installed or cannot."""
    if importlib.util.find_spec("torchao") is None or precision != "int8":
        return None
    torchao: Any = importlib.import_module("torchao.quantization")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    try:
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
        with torch.no_grad():
            seconds = _captured(bench, lambda: layer(given))
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        return None
    return weight.numel() / seconds / 1e9


def _semi_structured(bench: Bench, form: SparseFormat, weight: Tensor, given: Tensor) -> float | None:
    """Bytes of kept weights a second of torch's own product, whose units for sparsity take many rows; None without."""
    if not bench.cuda:
        return None
    packed = torch.zeros(form.nbytes, dtype=torch.uint8, device=weight.device)
    form.write(packed, 0, weight)
    pruned = form.decode(packed, 0, form.rows, weight.dtype)
    try:
        sparse: Any = torch.sparse.to_sparse_semi_structured(pruned)
        seconds = _captured(bench, lambda: torch.nn.functional.linear(given, sparse))
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return form.nbytes / seconds / 1e9
