"""`autoglm-lab finetune`: learn from a file of dialogues inside a budget, and write the adapter."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from autoglm_lab.errors import LabError


def finetune(
    model: Annotated[str, typer.Argument(help="A preset, a folder, or a hub id, fetched if it is not cached.")],
    data: Annotated[Path, typer.Argument(help='JSON lines, one dialogue a line: {"messages": […]}.')],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the checkpoints and the adapter go.")] = Path(
        "finetuned"
    ),
    budget: Annotated[str | None, typer.Option(metavar="SIZE", help="What the process may use: 24GiB.")] = None,
    policy_file: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="Settings as YAML; training: holds the memory's.")
    ] = None,
    method: Annotated[str, typer.Option(help="lora, or full: the weights of the text module.")] = "lora",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A linear layer with an adapter, or its last part; again for more."),
    ] = None,
    all_answers: Annotated[bool, typer.Option("--all-answers", help="Learn every answer, not only the last.")] = False,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-3,
    schedule: Annotated[str, typer.Option(help="Of the rate after the first steps: cosine or constant.")] = "cosine",
    ema: Annotated[
        float | None, typer.Option(metavar="DECAY", help="Learn the moving average of the steps: 0.99.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW, on matrices.")] = 0.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: by --epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Times through the data.")] = 1.0,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between two checkpoints.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of --out.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A bad line is an error.")] = False,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cuda:0, cpu. Default: the first GPU.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(metavar="PRECISION", help="Weights beneath the adapters: nf4, int8 or int4."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the data's order and the adapter's first values.")] = 0,
) -> None:
    """Fine-tune a model inside a budget. Ctrl-C stops after the step under way and writes a checkpoint."""
    adapter = out / "adapter"
    if adapter.exists():
        raise LabError(f"'{adapter}' exists: give another folder with --out, or remove it")
    if policy_file is not None and not policy_file.is_file():
        raise LabError(f"there is no file {policy_file}: --policy is a file of YAML")
    from autoglm_lab.opening import load
    from autoglm_lab.policy import MemoryPolicy
    from autoglm_lab.training.course import course_of
    from autoglm_lab.training.dataset import read_dataset

    course = course_of(
        method=method, rank=rank, alpha=2.0 * rank, learning_rate=learning_rate, steps=steps, epochs=epochs,
        save_every=save_every, resume=resume, out=out, seed=seed, targets=target or None, all_answers=all_answers,
        schedule=schedule, ema=ema, weight_decay=weight_decay,
    )  # fmt: skip
    dataset = read_dataset(data, strict=strict)
    policy = MemoryPolicy() if policy_file is None else MemoryPolicy.from_yaml(policy_file)
    with load(model, policy=policy, budget=budget, device=device, dtype=dtype, quantize=quantize) as wb:
        run = wb.tuner.begin(dataset, course, strict=strict, watch=_say)
        before = signal.signal(signal.SIGINT, lambda *_: run.stop())
        try:
            result = run.result()
        finally:
            signal.signal(signal.SIGINT, before)
        for problem in run.problems:
            typer.echo(f"left out: {problem}", err=True)
        typer.echo(str(result))
        if course.method == "lora":
            typer.echo(f"wrote {wb.tuner.save(adapter)}: wb.tuner.load({str(adapter)!r})")


def _say(run: Any) -> None:
    every = max(1, run.steps // 20)
    if run.state == "training" and (run.step in (1, run.steps) or run.step % every == 0) and run.losses:
        typer.echo(f"step {run.step} of {run.steps}: loss {run.losses[-1][1]:.4f}", err=True)
