"""`autoglm-lab serve`: a model behind OpenAI's endpoints, until it is told to stop."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from autoglm_lab.errors import LabError


def serve(
    model: Annotated[str, typer.Argument(help="A preset, a folder, or a hub id, fetched if it is not cached.")] = (
        "autoglm-tiny"
    ),
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    policy_file: Annotated[
        str | None, typer.Option("--policy", metavar="FILE", help="Settings as YAML, or auto for the best that fits.")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="SIZE", help="What the process may use: 24GiB.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cuda:0, cpu. Default: the first GPU.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="So many GPUs, a run of layers on each.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    weights: Annotated[str | None, typer.Option(help="dummy: made-up weights of the true shapes.")] = None,
    names: Annotated[
        list[str] | None, typer.Option("--name", help="A further name that the model answers to. May be repeated.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="AUTOGLM_LAB_API_KEY", help="What clients send as Bearer.", show_default=False)
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(envvar="AUTOGLM_LAB_ADMIN_KEY", help="What changes memory.", show_default=False)
    ] = None,
    media_domains: Annotated[
        list[str] | None,
        typer.Option("--allow-media-domain", metavar="HOST", help="Fetch images and sounds from it by https."),
    ] = None,
    origins: Annotated[
        list[str] | None, typer.Option("--allow-origin", metavar="URL", help="Web pages that may call.")
    ] = None,
    running: Annotated[int, typer.Option(min=1, help="Most answers under way at the same time.")] = 32,
    waiting: Annotated[int, typer.Option(min=0, help="Most requests that wait; beyond that: 429.")] = 128,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that answers may go on after a stop.")] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Also log what is asked.")] = False,
    engine: Annotated[str, typer.Option(help="local, or vllm: run it with the same settings.")] = "local",
    only_print: Annotated[bool, typer.Option("--print", help="vllm: only print its command.")] = False,
    form: Annotated[
        str, typer.Option("--as", metavar="FORM", help="vllm: print a command, or files for ray or kubernetes.")
    ] = "command",
    images: Annotated[int, typer.Option(min=0, help="vllm: most images of one request.")] = 4,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Processes with a GPU each that share every layer.")] = 1,
    data_parallel: Annotated[int, typer.Option(min=1, help="vllm: copies of the model.")] = 1,
) -> None:
    """Serve a model over HTTP, as OpenAI's API has it. Ctrl-C or SIGTERM stops it when its answers have ended."""
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "api_key": api_key,
        "admin_key": admin_key,
        "media_domains": tuple(media_domains or ()),
        "origins": tuple(origins or ()),
        "running": running,
        "waiting": waiting,
        "drain_seconds": drain,
        "log_prompts": log_prompts,
    }
    if names:
        given["names"] = tuple(names)
    policy: Any = policy_file
    if policy_file is not None and policy_file != "auto":
        if not Path(policy_file).is_file():
            raise LabError(f"there is no file {policy_file}: --policy is a file of YAML, or auto")
        from autoglm_lab.policy import MemoryPolicy

        policy = MemoryPolicy.from_yaml(Path(policy_file))
    if engine != "local" or only_print:
        from autoglm_lab.scale_out_command import scale_out

        more = {"images": images, "tensor_parallel": tensor_parallel, "data_parallel": data_parallel}
        where = {"name": (names or [model])[0], "host": host, "port": port, "running": running, **more}
        scale_out(engine, model, policy, budget, device, api_key, form if only_print else "run", where)
        return
    from autoglm_lab.server.settings import check_settings

    check_settings(**given)  # before minutes are spent on loading
    from autoglm_lab.opening import load
    from autoglm_lab.serving import listening

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    asked = {"policy": policy, "budget": budget, "device": device, "dtype": dtype, "weights": weights}
    asked |= {"devices": devices, "tensor_parallel": tensor_parallel}
    if tensor_parallel > 1:
        typer.echo(_shares(model, tensor_parallel))
    with load(model, **asked) as workbench:
        service, ranks = listening(workbench, **given), workbench.engine.state.ranks
        if ranks is not None:
            ranks.on_lost = lambda _: service.stop()
        typer.echo(f"{workbench.name} at {service.url}")
        service.run()
        if ranks is not None and ranks.lost is not None:
            raise LabError(f"{ranks.lost}, so the service has stopped, and every other rank")
        typer.echo("stopped")


def _shares(model: str, ranks: int) -> str:
    """What each rank will hold of the weights, before anything is read."""
    from autoglm_lab.models.loading import outline
    from autoglm_lab.models.tensor_parallel import shares_nbytes
    from autoglm_lab.units import format_bytes

    lines = []
    for rank, share in enumerate(shares_nbytes(outline(model).model, ranks)):
        parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in share.items())
        lines.append(f"rank {rank}: {format_bytes(sum(share.values()))} ({parts})")
    return "\n".join(["weights as the model's files have them:", *lines])
