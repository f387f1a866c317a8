"""`autoglm-lab bench`: run benches one after the other on one loaded model."""

from __future__ import annotations

import contextlib
import json
import shlex
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoglm_lab.bench.catalog import CATALOG, chosen, runner
from autoglm_lab.bench.report import Report
from autoglm_lab.errors import LabError

if TYPE_CHECKING:
    from autoglm_lab.bench.bench import Bench

_NAMES = ", ".join(CATALOG)


def bench(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help=f"{_NAMES}, or all.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")
    ] = None,
    small: Annotated[
        bool | None,
        typer.Option("--small/--full", help="The embedded model, or the phone model's shapes. Default: full on a GPU."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Let the soak go on for so long, instead of its 300 requests.")
    ] = None,
    soak: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.0, help="serve: also so long beside rude clients. Judged from 600 on."),
    ] = None,
    dialogues: Annotated[
        int | None, typer.Option(min=1, help="Dialogues of each task of quality. Default: 8 small, 128 full.")
    ] = None,
    smollm2: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="SmolLM2 as safetensors with its tokenizer, for its perplexity in quality."
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, help="Devices of parallel.")] = 2,
    rows: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="Rows of plan, budgets, quality that hold one of these: phone,cap"),
    ] = None,
    predict_only: Annotated[
        bool, typer.Option("--predict-only", help="plan: predict its rows and measure none; needs no GPU.")
    ] = False,
    predicted: Annotated[
        Path | None, typer.Option(metavar="FILE", help="plan: compare its rows with what --predict-only --json wrote.")
    ] = None,
) -> None:
    """Measure ours beside its peers and the limit, in one run. A bar that was missed is shown, and is no failure."""
    wanted = chosen(names)
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise LabError(f"cannot write {json_file}: its folder does not exist")
    if smollm2 is not None and not (smollm2 / "config.json").is_file():
        raise LabError(f"--smollm2 {smollm2} is no folder of a model: it has no config.json")
    if predict_only and wanted != ("plan",):
        raise LabError("--predict-only predicts the rows of plan: autoglm-lab bench plan --predict-only")
    from autoglm_lab.bench.bench import Bench

    reports: dict[str, Report] = {}
    failures: dict[str, str] = {}
    options = [] if small is None else ["--small" if small else "--full"]
    options += [] if minutes is None else ["--minutes", f"{minutes:g}"]
    options += [] if soak is None else ["--soak", f"{soak:g}"]
    options += [] if dialogues is None else ["--dialogues", str(dialogues)]
    options += [] if smollm2 is None else ["--smollm2", str(smollm2)]
    options += [] if ranks == 2 else ["--ranks", str(ranks)]
    options += [] if rows is None else ["--rows", rows]
    options += ["--predict-only"] * predict_only + ([] if predicted is None else ["--predicted", predicted.name])
    kept = None if json_file is None else json_file.with_suffix(".rows.jsonl")
    if kept is not None:
        kept.unlink(missing_ok=True)
    command = shlex.join(["autoglm-lab", "bench", *names, *options])
    settings = {
        "small": small,
        "minutes": minutes,
        "soak": soak,
        "dialogues": dialogues,
        "smollm2": smollm2,
        "ranks": ranks,
        "rows": rows,
    }
    settings |= {"predict_only": predict_only, "predicted": predicted}
    with Bench(**settings, kept=kept, command=command) as session:  # type: ignore[arg-type]
        for name in wanted:
            session.say(f"bench {name}: {CATALOG[name]}")
            try:
                reports[name] = runner(name)(session)
                typer.echo(f"{reports[name]}\n")
            except Exception as error:  # noqa: BLE001 - the other benches still have something to say
                failures[name] = "".join(traceback.format_exception(error))
                typer.echo(f"bench {name} failed: {type(error).__name__}: {error}\n", err=True)
            if json_file is not None:
                _write(json_file, reports, failures)
            _tidy(session)
    if failures:
        typer.echo("\n".join(failures.values()), err=True)
        raise typer.Exit(1)


def _tidy(session: Bench) -> None:
    """Bring the model back to how it was; where that fails, the next bench loads another."""
    try:
        session.reset()
    except Exception as error:  # noqa: BLE001 - whatever a failed bench left behind
        session.say(f"the model is loaded anew: {type(error).__name__}: {error}")
        with contextlib.suppress(Exception):
            session.close()


def _write(file: Path, reports: dict[str, Report], failures: dict[str, str]) -> None:
    """Written after every bench, so that what is measured stays when a later one takes the process down."""
    data = {"reports": {name: report.to_dict() for name, report in reports.items()}, "failures": failures}
    try:
        file.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise LabError(f"cannot write {file}: {error.strerror}") from None
