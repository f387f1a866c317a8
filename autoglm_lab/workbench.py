"""`Workbench`: what a person holds. It ties a model, its memory and its engine together."""

from __future__ import annotations

import importlib.util
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedConfig

from autoglm_lab.engine.admission import Admission
from autoglm_lab.engine.conversation import Conversations
from autoglm_lab.engine.encoder import Encoder
from autoglm_lab.engine.encoder_phase import mark_encoding
from autoglm_lab.engine.local import LocalEngine
from autoglm_lab.engine.messages import image_size
from autoglm_lab.engine.overflow import check_overflow
from autoglm_lab.engine.policy_change import check_modules
from autoglm_lab.engine.protocol import Capabilities
from autoglm_lab.engine.state import EngineState
from autoglm_lab.engine.step import Stepper
from autoglm_lab.engine_bench import EngineBench
from autoglm_lab.errors import EngineClosedError, LabError, ModuleError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.allocator_setting import expand_segments
from autoglm_lab.memory.kv.feature_store import FeatureStore
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.ledger import Ledger, LedgerBook
from autoglm_lab.memory.peak import PeakMeter
from autoglm_lab.memory.planning.device_constants import PlanDevice, plan_device
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.planner import planner
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.memory.reclaim import Reclaimer
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.memory.sampler import Sampler
from autoglm_lab.memory.snapshot import snapshot, write_snapshot
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.dialogue import refuse_unfit
from autoglm_lab.models.image_tokens import image_tokens, limit_image_tokens
from autoglm_lab.models.loading import Outline, Resolved
from autoglm_lab.models.original import Original
from autoglm_lab.models.precision import convert, made_in, precisions_of
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.models.spread import Spread
from autoglm_lab.policy import MemoryPolicy

if TYPE_CHECKING:
    from autoglm_lab.engine.parallel.ranks import Ranks
    from autoglm_lab.training.run import TrainingRun
    from autoglm_lab.training.tuner import Tuner

_open: weakref.WeakSet[Workbench] = weakref.WeakSet()


def open_workbenches() -> tuple[Workbench, ...]:
    """The workbenches of this process that are not closed, by name."""
    return tuple(sorted((one for one in _open if not one.closed), key=lambda one: one.name))


class Workbench(EngineBench):
    """A model, its memory, and everything one can do with them.

    Attributes:
        model: the plain transformers model.
        processor: the plain transformers processor, or tokenizer.
    """

    engine: LocalEngine

    def __init__(
        self,
        resolved: Resolved,
        policy: MemoryPolicy,
        *accelerators: Accelerator,
        spread: Spread | None = None,
        ranks: Ranks | None = None,
        progress: bool | None = False,
    ) -> None:
        accelerator = accelerators[0]
        refuse_unfit(resolved.model)
        self.name = resolved.name
        self.model, self.processor = resolved.model, resolved.processor
        self._outline: Outline | None = None
        self._original = Original(resolved.model)
        resolved.model.eval()
        self._book = book = LedgerBook(*accelerators)
        self._tuner: Tuner | None = None
        started = time.monotonic()
        self.samplers = tuple(Sampler(_weakly(self, card)) for card in range(len(accelerators)))
        self.sampler = self.samplers[0]
        check_modules(policy, [spec.name for spec in anatomy(resolved.model)])
        check_overflow(policy.kv, resolved.model)
        record = self.sampler.record if ranks is None else ranks.moving(self.sampler.record)
        residency = Residency(resolved, *accelerators, policy=policy, on_event=record, spread=spread)
        try:
            for one in accelerators:
                one.set_budget(policy.budget)
            residency.materialise(progress=progress)
            notes = resolved.notes if ranks is None else (*resolved.notes, *ranks.begin(residency))
        except BaseException:
            residency.close()
            raise
        book.register(residency)
        form = PageFormat.of(resolved.config, resolved.dtype, policy.kv.precision)
        pool = None
        if form is not None:
            place, pinned, layers = policy.kv.place, residency.pinned, residency.layers
            pool = KvPool(form, *accelerators, place=place, pinned=pinned, mirror=ranks, layers=layers)
        features = FeatureStore()
        state = EngineState(
            model=resolved.model,
            processor=resolved.processor,
            residency=residency,
            accelerators=accelerators,
            reclaimer=Reclaimer(*accelerators),
            samplers=self.samplers,
            meter=PeakMeter(accelerator.device, lambda: accelerator.reading().process),
            stepper=Stepper(resolved.model, encoder=Encoder(resolved.model, features)),
            policy=policy,
            conversations=Conversations(pool),
            pool=pool,
            features=features,
            context_tokens=_context_tokens(resolved.config),
            ranks=ranks,
        )
        if spread is None:  # a plan is of one device
            state.admission = Admission(state, resolved.name, resolved.dtype)
        state.prepare_steps()
        state.limit_stores()
        self._hooks = mark_encoding(residency, state)
        self.engine = LocalEngine(state, book, _capabilities(resolved, residency, accelerator))
        nbytes = sum(module.nbytes for module in residency.values() if module.place == "device")
        state.event("loaded", self.name, nbytes=nbytes, seconds=time.monotonic() - started)
        for subject, why in (*((note, "") for note in notes), *_notes(resolved, state, spread)):
            state.event("note", subject, why=why)
        for sampler in self.samplers:
            sampler.start()
        weakref.finalize(self, _let_go, self.engine.state)
        for other in open_workbenches():
            state.event("note", f"another workbench of this process, '{other.name}', is open: close() frees it")
        _open.add(self)

    def finetune(
        self,
        dataset: Any,
        *,
        method: Literal["lora", "full"] = "lora",
        strict: bool = False,
        watch: Callable[[TrainingRun], None] | None = None,
        **settings: Any,
    ) -> TrainingRun:
        """Fine-tune the model inside the budget. Returns at once; ``result()`` or ``await`` waits for the end.

        The memory that it takes stands in ``policy.training``. Turns wait until it is over, and then the model answers
        with what it has learnt; ``wb.tuner`` switches, merges, saves and loads adapters. Needs the extra ``train``.

        Args:
            dataset: a JSONL file of dialogues (see `training.dataset`), or their objects.
            method: ``lora``: low-rank adapters on the decoder; ``full``: the weights of ``modules`` themselves.
            strict: a bad line of the data is an error; else it is left out and named in ``run.problems``.
            watch: called after each step, on the engine's thread: it must not wait.
            settings: of `training.course.Course`: ``rank``, ``steps``, ``epochs``, ``learning_rate``, ``out``,
                ``resume`` …

        Raises:
            DatasetError: the data cannot be learnt from.
            TrainingError: another training has the model, or a setting cannot be.
        """
        from autoglm_lab.training.course import course_of

        return self.tuner.begin(dataset, course_of(method=method, **settings), strict=strict, watch=watch)

    @property
    def tuner(self) -> Tuner:
        """Training and adapters: what was learnt, switched on and off, merged, saved, loaded.

        Raises:
            LabError: the extra ``train`` is not installed.
        """
        if self.engine.state.ranks is not None:
            raise LabError("fine-tuning needs the whole model in one process: load it without tensor_parallel")
        self._refuse_several("fine-tuning is for one device")
        if self._tuner is None:
            if importlib.util.find_spec("peft") is None:
                raise LabError('fine-tuning needs the extra "train": pip install "autoglm-lab[train]"')
            from autoglm_lab.training.tuner import Tuner

            self._tuner = Tuner(self.engine, self._book, self._recompute)
        return self._tuner

    def _refuse_several(self, why: str) -> None:
        count = len(self.engine.state.accelerators)
        if count > 1:
            raise LabError(f"{why}, and this model lies on {count}: load it without devices=")

    def _recompute(self, load: TrainingLoad) -> frozenset[int] | None:
        return planner(self.outline(), self.plan_device(self.policy.budget)).recompute(self.policy, load)

    @property
    def training(self) -> TrainingRun | None:
        """The training under way, or the last one."""
        return None if self._tuner is None else self._tuner.run

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters on the model."""
        return () if self._tuner is None else self._tuner.adapters

    # memory

    def ledgers(self) -> tuple[Ledger, ...]:
        """One for each device that holds a part of the model; the first is `memory`."""
        return self.engine.ledgers()

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

    def image_tokens(self, image: Any) -> int | None:
        """How many tokens an image will take of the prompt, under ``policy.max_image_tokens``.

        Args:
            image: as `chat` takes it, or its ``(width, height)``.

        Returns:
            None where the processor does not tell before it has seen the image, or takes none.

        Raises:
            MediaError: the image cannot be read.
        """
        return image_tokens(self.processor, image if isinstance(image, tuple) else image_size(image))

    def outline(self) -> Outline:
        """The model without its weights, as a plan takes it. Made once."""
        if self._outline is None:
            dtype, processor = getattr(torch, self.engine.capabilities.dtype), self.processor
            model = skeleton(self.model.config, made_in(self.model))
            convert(model, precisions_of(self.model))
            self._outline = Outline(self.name, model, dtype, lambda: processor)
        return self._outline

    def plan_device(self, budget: int | None) -> PlanDevice:
        """The device with what was measured on it, and what is left over in this process while nothing runs.

        Raises:
            LabError: the model lies on several devices, and a plan is of one.
        """
        self._refuse_several("a plan is of one device")
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

    def detach(self) -> Any:
        """Give the model back as it was: its weights in memory of torch's own, on the device, no hook of ours left.

        The workbench is closed then. What was parked is brought back first.

        Returns:
            The model.

        Raises:
            ModuleError: a variable outside the model views weights, or a forward pass of another thread runs.
            OutOfMemoryError: a parked module does not fit on the device.
        """
        if self.engine.state.ranks is not None:
            raise ModuleError("this process holds a part of the model: load it without tensor_parallel")
        self.engine.detach()
        for hook in self._hooks:
            hook.remove()
        self._original.restore()
        limit_image_tokens(self.processor, None)
        return self.model


def _notes(resolved: Resolved, state: EngineState, spread: Spread | None) -> Iterator[tuple[str, str]]:
    """What of the policy holds otherwise here, or not: subjects and sentences."""
    policy = state.policy
    if spread is not None:
        yield "placement", f"{spread}. Turns are tried without a plan: it is of one device"
    if policy.placement.host_bytes and state.residency.on_host is None:
        why = "they are one here" if spread is None else "the model lies on several devices"
        yield "placement", f"nothing is kept on the host beside the device: {why}"
    fixed = limit_image_tokens(resolved.processor, policy.max_image_tokens)
    if fixed:
        yield "max_image_tokens", fixed
    if state.pool is None:
        yield "keys and values", _OWN_CACHE
    late = expand_segments(state.accelerator.kind) if policy.reclaim.expandable_segments else ""
    if late:
        yield "reclaim", late


_OWN_CACHE = (
    "this model's layers slide, keep a state or look at an image, so they stay in transformers' own cache: one "
    "conversation decodes at a time, and nothing of it is shared with another"
)


def _weakly(workbench: Workbench, card: int) -> Callable[[], Ledger]:
    """Reads a device's ledger without keeping the workbench alive: the sampler's thread outlives what nobody holds."""
    reference = weakref.ref(workbench)

    def read() -> Ledger:
        held = reference()
        if held is None:
            raise EngineClosedError("the workbench is gone")
        return held.engine.ledger(card)

    return read


def _let_go(state: EngineState) -> None:
    """Free what a workbench held that nobody holds any more."""
    for sampler in state.samplers:
        sampler.stop()
    if state.admission is not None:
        state.admission.close()
    state.features.clear()
    if state.pool is not None:
        state.pool.close()
    state.residency.close()
    if state.ranks is not None:
        state.ranks.close()
    state.set_budget(None)


def _capabilities(resolved: Resolved, residency: Residency, accelerator: Any) -> Capabilities:
    modalities = ["text", *["image"] * ("vision" in residency), *["audio"] * ("audio" in residency)]
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
