"""`/v1/memory`: the ledger, the policy and its switches, for a dashboard somewhere else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from autoglm_lab.engine.wire import to_wire
from autoglm_lab.errors import ContextLimitError
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.models.image_tokens import image_tokens
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.server.request_error import RequestError
from autoglm_lab.server.service import Service, service_of
from autoglm_lab.server.sse import EventStream, event

router = APIRouter(prefix="/v1/memory")

_Name = Annotated[str, Field(max_length=200)]


class ParkRequest(BaseModel):
    """Where a module goes: ``auto``, ``host`` or ``disk``."""

    place: Literal["auto", "host", "disk"] = "auto"


class TrainingRequest(BaseModel):
    """What is learnt, as `memory.planning.training_load.TrainingLoad` has it."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["lora", "full"] = "lora"
    tokens: int = Field(2048, ge=2, le=1 << 17)
    rank: int = Field(16, ge=1, le=1024)


class WorkloadRequest(BaseModel):
    """How much is read and written, as `memory.planning.workload.Workload` has it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    context: int = Field(8192, ge=1, le=1 << 24)
    new_tokens: int = Field(256, ge=1, le=1 << 24)
    images: int = Field(0, ge=0, le=1000)
    image_size: tuple[Annotated[int, Field(ge=1, le=1 << 15)], Annotated[int, Field(ge=1, le=1 << 15)]] = (1080, 2400)
    audio_seconds: float = Field(0.0, ge=0, le=86_400)
    conversations: int = Field(1, ge=1, le=100_000)
    training: TrainingRequest | None = None


class PlanRequest(BaseModel):
    """What is asked of a plan: changes of the policy as it is now, a workload, and whether to look for alternatives."""

    model_config = ConfigDict(extra="forbid")

    policy: dict[str, Any] | None = None
    workload: WorkloadRequest = WorkloadRequest()
    search: bool = True


@router.get("")
async def ledger(request: Request) -> dict[str, Any]:
    """Who owns which bytes of the device now, what the engine is doing, and how fast it decodes.

    ``devices`` has the ledger of every device that holds a part of the model, this one's first.
    """
    service = service_of(request)
    devices: list[dict[str, Any]] = to_wire(await asyncio.to_thread(service.engine.ledgers))
    return devices[0] | {"tokens_per_second": service.engine.tokens_per_second, "devices": devices}


@router.get("/capabilities")
async def capabilities(request: Request) -> dict[str, Any]:
    """What the model can do."""
    engine = service_of(request).engine
    found: dict[str, Any] = to_wire(engine.capabilities)
    pool = engine.state.pool
    pages = {"pages": None, "page_bytes": 0} if pool is None else {"pages": pool.form, "page_bytes": pool.page_bytes}
    return found | {name: to_wire(value) for name, value in pages.items()}


@router.get("/image-tokens")
async def image_cost(
    request: Request,
    width: Annotated[int, Query(ge=1, le=1 << 15)],
    height: Annotated[int, Query(ge=1, le=1 << 15)],
) -> dict[str, int | None]:
    """How many tokens an image of so many pixels takes of a prompt; null: the model does not tell, or takes none."""
    processor = service_of(request).engine.state.processor
    return {"tokens": await asyncio.to_thread(image_tokens, processor, (width, height))}


@router.get("/policy")
async def policy(request: Request) -> dict[str, Any]:
    """Every setting."""
    settings: dict[str, Any] = to_wire(service_of(request).engine.policy)
    return settings


@router.patch("/policy")
async def change_policy(request: Request, changes: dict[str, Any]) -> dict[str, Any]:
    """Change settings, part by part; the others stay. Answers with every setting as it is then."""
    engine = service_of(request).engine
    await asyncio.to_thread(engine.set_policy, _changed(engine.policy, changes))
    return await policy(request)


@router.get("/modules")
async def modules(request: Request) -> list[dict[str, Any]]:
    """The modules and where their weights are."""
    found: list[dict[str, Any]] = to_wire(service_of(request).engine.modules())
    return found


@router.post("/modules/{name}/park")
async def park(request: Request, name: _Name, asked: ParkRequest | None = None) -> dict[str, Any]:
    """Move a module off the device. Answers when it is off, with the event."""
    engine = _with_module(request, name).engine
    place = ParkRequest().place if asked is None else asked.place
    return await _moved(await asyncio.to_thread(engine.park, name, place))


@router.post("/modules/{name}/wake")
async def wake(request: Request, name: _Name) -> dict[str, Any]:
    """Move a module onto the device. Answers when it is there, with the event."""
    engine = _with_module(request, name).engine
    return await _moved(await asyncio.to_thread(engine.wake, name))


@router.post("/reclaim")
async def reclaim(request: Request) -> dict[str, Any]:
    """Give unused memory back to the system."""
    done: dict[str, Any] = to_wire(await asyncio.to_thread(service_of(request).engine.reclaim))
    return done


@router.get("/conversations")
async def conversations(request: Request) -> list[dict[str, Any]]:
    """The conversations whose keys and values are kept."""
    found: list[dict[str, Any]] = to_wire(service_of(request).engine.conversations())
    return found


@router.delete("/conversations/{name:path}", status_code=204)
async def drop(request: Request, name: _Name) -> Response:
    """Forget a conversation."""
    service = service_of(request)
    if all(one.name != name for one in service.engine.conversations()):
        raise RequestError(404, "there is no conversation of that name", "conversation_not_found", param="name")
    await asyncio.to_thread(service.engine.drop, name)
    return Response(status_code=204)


@router.post("/plan")
async def plan(request: Request, asked: PlanRequest) -> dict[str, Any]:
    """What a workload needs on this device, and what would make it fit."""
    service = service_of(request)
    one, context = asked.workload, service.engine.capabilities.context_tokens
    if context is not None and one.context + one.new_tokens > context:
        raise ContextLimitError(f"the model takes {context:,} tokens, this asks for {one.context + one.new_tokens:,}")
    wanted = _changed(service.engine.policy, asked.policy) if asked.policy else None
    learnt = None if one.training is None else TrainingLoad(**one.training.model_dump())
    workload = Workload(
        one.context, one.new_tokens, one.images, one.image_size, one.audio_seconds, one.conversations, learnt
    )
    found: dict[str, Any] = to_wire(await asyncio.to_thread(service.plan, wanted, workload, asked.search))
    return found


@router.get("/events", response_class=Response)
async def events(
    request: Request,
    rate: Annotated[float, Query(gt=0, le=10)] = 2.0,
    since: Annotated[float | None, Query(allow_inf_nan=False)] = None,
) -> Response:
    """Samples and events as they come, as server-sent events.

    ``rate``: samples a second; ``since``: seconds since the epoch after which events are told, None: from now on.
    """
    return EventStream(_stream(service_of(request), rate, since))


async def _stream(service: Service, rate: float, since: float | None) -> AsyncIterator[bytes]:
    sampler, seen = service.engine.state.sampler, None
    last: Event | None = None
    for one in sampler.events():
        if since is None or one.time <= since:
            last = one
    while not (service.stopping or service.engine.closed):
        latest = sampler.latest
        if latest is not None and latest is not seen:
            seen = latest
            yield event(to_wire(latest), "sample")
        for one in _since(sampler.events(), last):
            last = one
            yield event(to_wire(one), "event")
        await asyncio.sleep(1 / rate)


def _changed(policy: MemoryPolicy, changes: dict[str, Any]) -> MemoryPolicy:
    try:
        return policy.replace(**changes)
    except (TypeError, RecursionError):
        raise RequestError(400, "changes are settings by name, part by part", "invalid_setting") from None


def _since(found: tuple[Event, ...], last: Event | None) -> tuple[Event, ...]:
    at = next((index for index in reversed(range(len(found))) if found[index] is last), -1)
    return found[at + 1 :]


def _with_module(request: Request, name: str) -> Service:
    service = service_of(request)
    known = [module.name for module in service.engine.modules()]
    if name not in known:
        message = f"this model has no module of that name; its modules are {', '.join(known)}"
        raise RequestError(404, message, "module_not_found", param="name")
    return service


async def _moved(move: Move) -> dict[str, Any]:
    done: dict[str, Any] = to_wire(await asyncio.to_thread(move.result))
    return done
