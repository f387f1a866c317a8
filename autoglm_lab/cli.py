"""The command `autoglm-lab`: lab, demo, plan, serve, finetune, bench, doctor."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from autoglm_lab import __version__
from autoglm_lab.bench.command import bench
from autoglm_lab.errors import LabError
from autoglm_lab.finetune_command import finetune
from autoglm_lab.serve_command import serve

app = typer.Typer(
    name="autoglm-lab",
    help="A workbench for the memory of modular multimodal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.command()(serve)
app.command()(finetune)


def main() -> None:
    """Run the command. What the package raises on purpose becomes one line and exit code 1, without a traceback."""
    try:
        app()
    except LabError as error:
        typer.echo(f"autoglm-lab: {error}", err=True)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autoglm-lab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """A workbench for the memory of modular multimodal language models."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(context: typer.Context) -> None:
    """Open the workbench in JupyterLab. Further arguments go to JupyterLab: --no-browser --port 8899."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise LabError('JupyterLab is not installed: pip install "autoglm-lab[lab]"')
    notebook = _notebook().resolve()
    # As the default address, the notebook also opens for those who copy the printed address into a browser elsewhere.
    where = [f"--ServerApp.root_dir={notebook.parent}", f"--LabApp.default_url=/lab/tree/{notebook.name}"]
    command = [sys.executable, "-m", "jupyterlab", *where, *_SETTINGS, *context.args]
    if os.geteuid() == 0 and "--allow-root" not in command:
        typer.echo("running as root, which JupyterLab has to be told to allow", err=True)
        command.append("--allow-root")
    settings = [str(Path(__file__).parent / "jupyter"), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, settings))
    os.execv(command[0], command)


# Nothing here needs a network: JupyterLab would look for a newer version of itself. What has no argument stands in
# jupyter/labconfig: it would ask on its first start whether it may fetch news.
_SETTINGS = ("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",)


def _notebook() -> Path:
    """The workbench's notebook: the checkout's own, else a copy in the current folder of what was installed."""
    package = Path(__file__).parent
    in_checkout = package.parent / "notebooks" / "00_workbench.ipynb"
    if in_checkout.exists():
        return in_checkout
    folder = Path("autoglm-lab-notebooks")
    for source in sorted((package / "notebooks").glob("*.ipynb")):
        folder.mkdir(exist_ok=True)
        # What the person changed in an earlier copy stays.
        if not (folder / source.name).exists():
            shutil.copyfile(source, folder / source.name)
    if not folder.exists():
        raise LabError("the notebooks are missing: this package was installed without them")
    return folder / "00_workbench.ipynb"


@app.command()
def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the answers and the ledgers to this file.")
    ] = None,
) -> None:
    """The embedded model answers to text, an image and a sound, and gives memory back."""
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise LabError(f"cannot write {json_file}: its folder does not exist")
    from autoglm_lab.demo import run

    report = run(say=typer.echo)
    if json_file is not None:
        _write(report.to_dict(), json_file)
    raise typer.Exit(0 if report.correct else 1)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A preset, a folder, or a hub id; no weights are fetched.")],
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What the process may use: 24GiB. Default: all that is free.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help='A card ("RTX 4090"), cuda or cpu. Default: what is here.')
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, those of its images included.")] = 8192,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 256,
    images: Annotated[int, typer.Option(min=0, help="Images in the prompt.")] = 0,
    image_size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Their size in pixels.")] = "1080x2400",
    audio_seconds: Annotated[float, typer.Option(min=0.0, help="Length of a sound in the prompt.")] = 0.0,
    conversations: Annotated[int, typer.Option(min=1, help="Kept at the same time, each as long.")] = 1,
    quantize: Annotated[
        str | None, typer.Option(metavar="BITS", help="Weights in int8 or int4; auto, with --policy auto: what fits.")
    ] = None,
    finetune: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Plan a step of fine-tuning on --context tokens: lora or full.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters that --finetune lora learns.")] = 16,
    policy_file: Annotated[
        str | None, typer.Option("--policy", metavar="FILE", help="Settings as YAML, or auto for the best that fits.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the plan to this file.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a policy that fits to this file, as YAML.")
    ] = None,
) -> None:
    """Whether a model fits, before anything is loaded, and what would make it fit. Exit code 1: it does not."""
    size = re.fullmatch(r"(\d+)[xX](\d+)", image_size)
    if size is None:
        raise LabError(f"cannot read --image-size {image_size!r}: write for example 1080x2400")
    method: Any = finetune
    for file in (json_file, export):
        if file is not None and not file.resolve().parent.is_dir():
            raise LabError(f"cannot write {file}: its folder does not exist")
    from autoglm_lab.opening import plan as planned
    from autoglm_lab.policy import MemoryPolicy

    policy: Any = policy_file
    if policy_file is not None and policy_file != "auto":
        if not Path(policy_file).is_file():
            raise LabError(f"there is no file {policy_file}: --policy is a file of YAML, or auto")
        policy = MemoryPolicy.from_yaml(Path(policy_file))
    found = planned(
        model,
        policy,
        budget=budget,
        device=device,
        context=context,
        new_tokens=new_tokens,
        images=images,
        image_size=(int(size[1]), int(size[2])),
        audio_seconds=audio_seconds,
        conversations=conversations,
        quantize=quantize,
        finetune=method,
        rank=rank,
    )
    typer.echo(str(found))
    if json_file is not None:
        _write(found.to_dict(), json_file)
    fitting = found.policy if found.fits else next((one.policy for one in found.alternatives if one.fits), None)
    if export is not None:
        if fitting is None:
            raise LabError(f"nothing was written to {export}: no policy fits")
        _write_text(fitting.to_yaml(), export)
        typer.echo(f"wrote {export}: lab.load({model!r}, policy=lab.MemoryPolicy.from_yaml(Path({str(export)!r})))")
    raise typer.Exit(0 if found.fits else 1)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What this machine has, what is too old or missing, and how to get it."""
    from autoglm_lab.doctor import examine

    report = examine()
    typer.echo(_json(report.to_dict()) if as_json else str(report))
    raise typer.Exit(0 if report.works else 1)


def _json(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2)


def _write(data: object, file: Path) -> None:
    _write_text(_json(data) + "\n", file)


def _write_text(text: str, file: Path) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LabError(f"cannot write {file}: {error.strerror}") from None
