"""`Workbench`: what a person holds. It ties model, memory, engine and widgets together."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from transformers import PreTrainedConfig

from autoglm_lab.engine.admission import Admission
from autoglm_lab.engine.conversation import Conversations
from autoglm_lab.engine.encoder import Encoder
from autoglm_lab.engine.local import LocalEngine, check_modules
from autoglm_lab.engine.protocol import Capabilities, ConversationInfo, Turn
from autoglm_lab.engine.state import EngineState
from autoglm_lab.engine.step import Stepper
from autoglm_lab.errors import EngineClosedError
from autoglm_lab.memory.allocator_setting import expand_segments
from autoglm_lab.memory.device_constants import PlanDevice, plan_device
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.feature_store import FeatureStore
from autoglm_lab.memory.kv_pool import KvPool
from autoglm_lab.memory.ledger import Ledger, LedgerBook
from autoglm_lab.memory.page_format import PageFormat
from autoglm_lab.memory.peak import PeakMeter
from autoglm_lab.memory.plan import Plan
from autoglm_lab.memory.planner import planner
from autoglm_lab.memory.reclaim import Reclaimer
from autoglm_lab.memory.residency import Residency
from autoglm_lab.memory.sampler import Sampler
from autoglm_lab.memory.snapshot import snapshot, write_snapshot
from autoglm_lab.memory.workload import Workload
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.loading import Outline, Resolved
from autoglm_lab.models.precision import convert, made_in, precisions_of
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.modules import Modules
from autoglm_lab.policy import MemoryPolicy

_open: weakref.WeakSet[Workbench] = weakref.WeakSet()


def open_workbenches() -> tuple[Workbench, ...]:
    """The workbenches of this process that are not closed, by name."""
    return tuple(sorted((one for one in _open if not one.closed), key=lambda one: one.name))


class Workbench:
    """A model, its memory, and everything one can do with them.

    Attributes:
        model: the plain transformers model.
        processor: the plain transformers processor, or tokenizer.
        engine: what answers; see `engine.protocol.Engine`.
        sampler: ledgers over time, and events.
    """

    def __init__(self, resolved: Resolved, policy: MemoryPolicy, *, accelerator: Any) -> None:
        self.name = resolved.name
        self.model, self.processor = resolved.model, resolved.processor
        self._outline: Outline | None = None
        book = LedgerBook(accelerator)
        started = time.monotonic()
        self.sampler = Sampler(_weakly(self))
        check_modules(policy, [spec.name for spec in anatomy(resolved.model)])
        residency = Residency(resolved, accelerator, policy=policy, on_event=self.sampler.record)
        try:
            accelerator.set_budget(policy.budget)
            residency.materialise()
        except BaseException:
            residency.close()
            raise
        book.register(residency)
        form = PageFormat.of(resolved.config, resolved.dtype, policy.kv.precision)
        pool = None if form is None else KvPool(form, accelerator, policy.kv.place, residency.pinned)
        features = FeatureStore()
        state = EngineState(
            model=resolved.model,
            processor=resolved.processor,
            residency=residency,
            accelerator=accelerator,
            reclaimer=Reclaimer(accelerator),
            sampler=self.sampler,
            meter=PeakMeter(accelerator.device, lambda: accelerator.reading().process),
            stepper=Stepper(resolved.model, encoder=Encoder(resolved.model, features)),
            policy=policy,
            conversations=Conversations(pool),
            pool=pool,
            features=features,
            context_tokens=_context_tokens(resolved.config),
        )
        state.admission = Admission(state, resolved.name, resolved.dtype)
        state.prepare_steps()
        state.limit_stores()
        _mark_encoding(residency, state)
        self.engine = LocalEngine(state, book, _capabilities(resolved, residency, accelerator))
        nbytes = sum(module.nbytes for module in residency.values() if module.place == "device")
        state.event("loaded", self.name, nbytes=nbytes, seconds=time.monotonic() - started)
        for note in resolved.notes:
            state.event("note", note)
        late = expand_segments(accelerator.kind) if policy.reclaim.expandable_segments else ""
        if late:
            state.event("note", "reclaim", why=late)
        self.sampler.start()
        weakref.finalize(self, _let_go, self.engine.state)
        for other in open_workbenches():
            state.event("note", f"another workbench of this process, '{other.name}', is open: close() frees it")
        _open.add(self)

    # work

    def chat(
        self,
        text: str | None = None,
        *,
        image: Any = None,
        images: Any = (),
        audio: Any = None,
        system: str | None = None,
        conversation: str = "main",
        live: bool = False,
        thinking: bool | None = None,
        **generation: Any,
    ) -> Turn:
        """Say something to the model. Returns at once; ``await`` it to stream the answer into the cell.

        Args:
            image, images: PIL images, paths or bytes; shown before the text.
            audio: float samples 16 kHz mono, ``(samples, rate)``, a path or bytes; heard before the text.
            system: a system prompt, for the first turn of a conversation.
            conversation: which dialogue; a new name begins one.
            live: leave the question open: `Turn.feed` sound into it, then `Turn.ask`.
            thinking: let the model think first; None: as the policy says.
            generation: any setting of ``policy.generation`` for this turn alone.

        Raises:
            MessageError, MediaError: the input cannot be read.
            ModuleOffError: it needs a module that the policy keeps off.
        """
        media = [*([image] if image is not None else []), *images]
        content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in media]
        if audio is not None:
            content.append({"type": "audio", "audio": audio})
        if text is not None:
            content.append({"type": "text", "text": text})
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
        if content or not live:
            messages.append({"role": "user", "content": content})
        turn = self.engine.submit(messages, conversation=conversation, live=live, thinking=thinking, **generation)
        turn.presenter = _present
        return turn

    # memory

    @property
    def policy(self) -> MemoryPolicy:
        """Every setting; assign another policy to change any of them."""
        return self.engine.policy

    @policy.setter
    def policy(self, policy: MemoryPolicy | Mapping[str, Any]) -> None:
        self.engine.set_policy(policy if isinstance(policy, MemoryPolicy) else MemoryPolicy.from_dict(policy))

    @property
    def memory(self) -> Ledger:
        """Who owns which bytes of the device, now."""
        return self.engine.ledger()

    @property
    def modules(self) -> Modules:
        """The modules by name: ``wb.modules["audio"].park()``."""
        return Modules(self.engine)

    @property
    def conversations(self) -> tuple[ConversationInfo, ...]:
        return self.engine.conversations()

    @property
    def events(self) -> tuple[Event, ...]:
        """What happened to the memory, oldest first."""
        return self.sampler.events()

    def reclaim(self) -> Event:
        """Give unused memory back to the system; the event says how many bytes really went."""
        return self.engine.reclaim()

    def snapshot(self, path: str | Path) -> Path:
        """Write the memory of the device as it is now, for PyTorch's memory viewer (pytorch.org/memory_viz).

        On a GPU it holds torch's own segments and, with a name each, what lies outside of them: weights, pages of keys
        and values, the context. On a CPU it holds the rows of the ledger. It is a pickle, as the viewer wants it.

        Returns:
            The file, which is there whole or not at all.

        Raises:
            LabError: the folder is not there, or the disk is full.
        """
        return write_snapshot(path, snapshot(self.memory, self.engine.state.accelerator.device))

    def drop(self, conversation: str) -> None:
        """Forget a conversation and free its keys and values."""
        self.engine.drop(conversation)

    def stop(self) -> None:
        """Stop every answer under way."""
        self.engine.stop()

    def outline(self) -> Outline:
        """The model without its weights, as a plan takes it. Made once."""
        if self._outline is None:
            dtype, processor = getattr(torch, self.engine.capabilities.dtype), self.processor
            model = skeleton(self.model.config, made_in(self.model))
            convert(model, precisions_of(self.model))
            self._outline = Outline(self.name, model, dtype, lambda: processor)
        return self._outline

    def plan_device(self, budget: int | None) -> PlanDevice:
        """The device with what was measured on it, and what is left over in this process while nothing runs."""
        idle = (sample for sample in reversed(self.sampler.samples()) if sample.phase == "idle")
        leftovers = max(0, next((sample.unattributed for sample in idle), 0))
        return replace(plan_device(None, budget, self.engine.state.accelerator), leftovers=leftovers)

    def plan(
        self, policy: MemoryPolicy | None = None, workload: Workload | None = None, *, search: bool = True
    ) -> Plan:
        """What ``workload`` needs on this device as it is now. `plan` of the package takes its figures one by one.

        Args:
            policy: None: the workbench's.
            workload: None: a prompt of 8,192 tokens and an answer of 256.
            search: also look for alternatives where it does not fit.
        """
        wanted = policy or self.policy
        predict = planner(self.outline(), self.plan_device(wanted.budget))
        return predict.plan(wanted, workload or Workload(), search=search)

    # surfaces

    def dashboard(self, lang: Literal["en", "zh"] = "en") -> Any:
        """The same with widgets. Needs the extra ``lab``."""
        from autoglm_lab.widgets.dashboard import Dashboard

        return Dashboard(self, lang=lang)

    @property
    def closed(self) -> bool:
        return self.engine.closed

    def close(self) -> None:
        """Stop, and free everything. The workbench cannot be used afterwards."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"{self.name} (closed)"
        return f"{self.name} · {self.engine.capabilities.dtype} · {self.engine.capabilities.where}\n{self.memory}"

    def _repr_html_(self) -> str:
        if self.closed:
            return f"<b>{self.name}</b> (closed)"
        capabilities = self.engine.capabilities
        return f"<b>{self.name}</b> · {capabilities.dtype} · {capabilities.where}{self.memory._repr_html_()}"


def _weakly(workbench: Workbench) -> Callable[[], Ledger]:
    """Reads the ledger without keeping the workbench alive: the sampler's thread outlives what nobody holds."""
    reference = weakref.ref(workbench)

    def read() -> Ledger:
        held = reference()
        if held is None:
            raise EngineClosedError("the workbench is gone")
        return held.engine.ledger()

    return read


def _let_go(state: EngineState) -> None:
    """Free what a workbench held that nobody holds any more."""
    state.sampler.stop()
    if state.admission is not None:
        state.admission.close()
    state.features.clear()
    if state.pool is not None:
        state.pool.close()
    state.residency.close()
    if state.accelerator.budget is not None:
        state.accelerator.set_budget(None)


async def _present(turn: Turn) -> None:
    from autoglm_lab.widgets.stream import stream_into_cell

    await stream_into_cell(turn)


def _mark_encoding(residency: Residency, state: EngineState) -> None:
    """Let the engine know when a forward is inside an encoder, so that its peak is told apart from the prefill's."""

    def begin(*_: Any) -> None:
        if state.phase == "prefill":
            state.enter("encode", *state.peaks)

    def end(*_: Any) -> None:
        if state.phase == "encode":
            state.enter("prefill", *state.peaks)

    for spec in residency.specs:
        if spec.name in ("vision", "audio"):
            for root in spec.roots:
                encoder = residency.model.get_submodule(root)
                encoder.register_forward_pre_hook(begin)
                encoder.register_forward_hook(end, always_call=True)


def _capabilities(resolved: Resolved, residency: Residency, accelerator: Any) -> Capabilities:
    modalities = ["text"]
    modalities += ["image"] * ("vision" in residency) + ["audio"] * ("audio" in residency)
    tokenizer = getattr(resolved.processor, "tokenizer", resolved.processor)
    template = str(getattr(resolved.processor, "chat_template", "") or getattr(tokenizer, "chat_template", ""))
    return Capabilities(
        model=resolved.name,
        where="in this kernel",
        device=accelerator.name,
        dtype=str(resolved.dtype).removeprefix("torch."),
        modalities=tuple(modalities),
        thinking="enable_thinking" in template,
        memory_control=True,
        context_tokens=_context_tokens(resolved.config),
    )


def _context_tokens(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)
