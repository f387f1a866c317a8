"""What a model will need, before anything is loaded: the peak of every phase by the rows of the ledger.

Weights come from the skeleton, keys and values from the pool's own arithmetic, activations from a trace of the model's
own code on tensors without data (`activations`), the rest from constants of the device (`device_constants`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from autoglm_lab.errors import LoadError
from autoglm_lab.memory.kv.eviction import chunk_within
from autoglm_lab.memory.kv.host_prefetch import stage_width
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat
from autoglm_lab.memory.planning.activations import Activations, captured_batches
from autoglm_lab.memory.planning.device_constants import PlanDevice
from autoglm_lab.memory.planning.encoder_tapes import Medium, MediumInputs
from autoglm_lab.memory.planning.plan import PhasePlan, Plan, PlannedPhase, PlanRow
from autoglm_lab.memory.planning.plan_search import alternatives
from autoglm_lab.memory.planning.plan_train import StepCost, TrainingCosts
from autoglm_lab.memory.planning.planned_weights import PlannedWeights, SplitWeights
from autoglm_lab.memory.planning.rounded_outline import outline_in
from autoglm_lab.memory.planning.step_work import Peak, RequestCost, Steps, Work
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.image_tokens import resized
from autoglm_lab.models.loading import Outline
from autoglm_lab.models.precision import precisions_of
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import format_bytes

_CHUNK = 2 << 20
_GRAIN = 512
_STAGES = "KV stages"
_NEEDS: dict[Medium, str] = {"vision": "images", "audio": "audio_seconds"}


class Planner:
    """Predicts for one model and kind of device.

    Making one reads shapes only. The first `plan` traces the model's code, which takes a second or two; later ones
    evaluate what was learnt, in some milliseconds.

    Args:
        outline: the model without weights.
        device: where it is to run.
    """

    def __init__(self, outline: Outline, device: PlanDevice) -> None:
        self.name, self.dtype, self.device = outline.name, outline.dtype, device
        self._outline = outline
        self._model: PreTrainedModel = outline.model
        self._weights = PlannedWeights(self._model, device.kind)
        self._pages = PageFormat.of(self._model.config, self.dtype)
        self._activations = Activations(outline, device.kind)
        self.processor = outline.processor
        self._training = TrainingCosts(outline, device.kind)

    def of(self, device: PlanDevice) -> Planner:
        """The same model on another device of the same kind; what was learnt is kept."""
        other = object.__new__(Planner)
        other.__dict__.update(self.__dict__)
        other.device = device
        return other

    def kept_in(self, precisions: Mapping[str, str]) -> Planner:
        """The same model with its modules in these precisions, whose layers then allocate what such layers do.

        Raises:
            LoadError: the model's layers cannot be kept in that precision.
        """
        if dict(precisions) == precisions_of(self._model):
            return self
        other = planner(outline_in(self._outline, precisions), self.device)
        other.name = self.name
        return other

    @property
    def modules(self) -> tuple[str, ...]:
        return self._weights.modules

    def plan(self, policy: MemoryPolicy, workload: Workload, *, search: bool = True) -> Plan:
        """The plan of a workload under a policy.

        Args:
            search: also look for alternatives where it does not fit.
        """
        steps, notes = self._request(policy, workload)
        if workload.training is not None:
            notes = []
        phases = self._phases(policy, workload, steps)
        limit = self.device.free if policy.budget is None else min(policy.budget, self.device.free)
        plan = Plan(
            model=self.name,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.name,
            policy=policy,
            workload=workload,
            limit=limit,
            phases=phases,
            notes=(*notes, *self._activations.notes, *self._notes(policy, workload)),
            estimated=self.device.estimated,
            host_needed=self._on_host(policy, workload, steps) + self._activations_on_host(policy, workload),
            host_limit=self.device.host_free,
        )
        if plan.fits or not search:
            return plan
        return replace(plan, alternatives=alternatives(self, plan))

    def request(
        self,
        policy: MemoryPolicy,
        *,
        prompt: int,
        kept: int,
        chunks: Sequence[tuple[int, int]],
        batch: int = 1,
        media: Sequence[MediumInputs] = (),
        before_trace: Callable[[], None] | None = None,
    ) -> RequestCost:
        """What one real request needs, whose prompt and media are known.

        Args:
            prompt: tokens of the prompt, those included that are in the cache already.
            kept: most tokens in the cache at its end.
            chunks: the spans of the prompt that are read.
            batch: conversations that answer together, this one included.
            media: what is encoded for it.
            before_trace: called before each recording; None: nothing is recorded.

        Raises:
            UntracedError: something would have to be recorded first.
        """
        form = self._form(policy)
        graphs = self.device.kind == "cuda" and policy.kv.graphs and form is not None
        steps = Steps(form, prompt, kept, policy.kv.chunk, batch, graphs, tuple(chunks))
        work = self._activations.request(steps, media, before_trace)
        on_host = policy.kv.place == "host" and self.device.kind == "cuda"
        read, all_kept = (0 if on_host else self._in_chunks(self._kv(steps, tokens)) for tokens in (prompt, kept))
        return RequestCost(work, read, all_kept)

    def kv_tokens(self, policy: MemoryPolicy) -> int | None:
        """Most tokens of one conversation that the policy allows; None: as many as the model takes."""
        kv, form = policy.kv, self._form(policy)
        limits = [] if kv.max_tokens is None else [kv.max_tokens]
        if kv.max_bytes is not None and form is not None:
            limits.append(kv.max_bytes // self._stride(form) * PAGE_TOKENS)
        return min(limits, default=None)

    def can_keep(self, policy: MemoryPolicy) -> bool:
        """Whether the model's layers can be kept in the precision of a policy."""
        try:
            self._weights.under(policy)
        except LoadError:
            return False
        return True

    def passing(self, policy: MemoryPolicy) -> int:
        """Bytes of weights that pass the bus for every token."""
        return self._weights.under(policy).passing

    # phases

    def _phases(self, policy: MemoryPolicy, workload: Workload, steps: Steps) -> tuple[PhasePlan, ...]:
        if workload.training is not None:
            return self._training_phases(policy, workload.training)
        if policy.max_image_tokens is not None and workload.images:
            size = resized(self.processor(), workload.image_size, policy.max_image_tokens)
            workload = replace(workload, image_size=size)
        media = self._media(workload)
        weights = self._weights.under(policy)
        kept = [name for name in weights.slabs if name not in _NEEDS or _residency(policy, name) == "keep"]
        needed = [*kept, *(name for name in media if name not in kept and _residency(policy, name) != "off")]
        work = self._activations.work(steps, workload, media)
        idle = self._kv(steps, steps.kept) * (workload.conversations - 1)
        phases = [self._phase("load", weights, kept, self._fixed(self.device.loaded))]
        taken = self._fixed(self.device.working if steps.graphs else self.device.eager, streams=1 + steps.graphs)
        if work.encode is not None:
            rows = self._kv_rows(policy, idle, "KV, other conversations")
            phases.append(self._phase("encode", weights, needed, [*taken, *rows, *_work(work.encode)]))
        own = [PlanRow("KV", "kv", work.own_cache * workload.conversations, "transformers' own cache")]
        rows = own if steps.form is None else self._kv_rows(policy, idle + self._kv(steps, steps.prompt))
        rows = [*taken, *rows, *_encoder_rows(work.features), *_work(work.prefill)]
        phases.append(self._phase("prefill", weights, needed, rows))
        written = self._kv(steps, steps.kept) * workload.conversations
        rows = own if steps.form is None else self._kv_rows(policy, written)
        rows = [*taken, *rows, *_encoder_rows(min(work.features, policy.kv.encoder_bytes))]
        graphs = self._graph_rows(policy, steps, work)
        rows += [*graphs, *_work(work.decode.less_left(sum(row.nbytes for row in graphs if row.name == _STAGES)))]
        rows += [
            PlanRow(name, "weights", weights.slabs[name], "goes where memory is short, or when its time is over", True)
            for name in needed
            if name not in kept
        ]
        phases.append(self._phase("decode", weights, kept, rows))
        return tuple(phases)

    def _training_phases(self, policy: MemoryPolicy, load: TrainingLoad) -> tuple[PhasePlan, ...]:
        """Loading, and one step; what encoders gave waits on the host, and they are off the device meanwhile."""
        weights = self._weights.under(policy)
        kept = [name for name in weights.slabs if name not in _NEEDS or _residency(policy, name) == "keep"]
        staying = [name for name in kept if name not in _NEEDS or not policy.training.cache_features]
        learning = self._training.learning(load, policy.training.optimizer)
        rows = [
            *self._fixed(self.device.training, streams=2),
            PlanRow("adapters", "owner", learning.adapters, "low-rank weights in float32"),
            PlanRow("gradients", "owner", learning.gradients, "gradients of the weights that learn"),
            PlanRow("optimiser states", "owner", learning.states, f"states of {policy.training.optimizer}"),
        ]
        loading = self._phase("load", weights, kept, self._fixed(self.device.loaded))
        step, _ = self._step_cost(policy, load)
        if step is not None:
            chosen = self._chosen(policy, self._phase("train", weights, staying, rows), step)
            again = self._training.kept(policy.training, chosen)
            moves = self.device.kind == "cuda"
            rows += _work(Peak(step.peak(again, moves=moves), step.reserved(again, moves=moves)))
        return loading, self._phase("train", weights, staying, rows)

    def recompute(self, policy: MemoryPolicy, load: TrainingLoad) -> frozenset[int] | None:
        """The layers that ``auto`` computes again so that a training fits; None: it cannot be told."""
        step, _ = self._step_cost(policy, load)
        if step is None:
            return None
        without = self._training_phases(policy, load)[-1]
        rows = tuple(row for row in without.rows if row.kind not in ("activations", "allocator cache"))
        return self._chosen(policy, replace(without, rows=rows), step)

    def _chosen(self, policy: MemoryPolicy, without: PhasePlan, step: StepCost) -> frozenset[int]:
        limit = self.device.free if policy.budget is None else min(policy.budget, self.device.free)
        return self._training.mildest(step, policy.training, limit - without.needed)

    def _step_cost(self, policy: MemoryPolicy, load: TrainingLoad) -> tuple[StepCost | None, str]:
        """The cost of a micro-batch; None and why where the model's code could not be traced."""
        try:
            return self._training.step(load, policy.training), ""
        except Exception as error:  # noqa: BLE001 - any model's own code runs here
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            return None, f"a step of training could not be traced, so its activations are not counted ({reason})"

    def _phase(self, name: PlannedPhase, weights: SplitWeights, modules: list[str], rows: list[PlanRow]) -> PhasePlan:
        counts = f"weights in {str(self.dtype).removeprefix('torch.')}"
        slabs = [PlanRow(one, "weights", size, counts) for one, size in weights.slabs.items() if one in modules]
        stages = PlanRow("text stages", "weights", weights.stages, "where parts of layers come to from the host")
        return PhasePlan(name, tuple(row for row in (*slabs, stages, *rows) if row.nbytes))

    def _fixed(self, grown: int, *, streams: int = 1) -> list[PlanRow]:
        """What the device's libraries and its driver take.

        Args:
            grown: bytes that the driver takes on top of the context.
            streams: that have workspaces: captures have one of their own, and so has the backward pass.
        """
        device = self.device
        told = "measured on another kind of device" if device.estimated else "as measured on this kind of device"
        return [
            PlanRow("workspaces", "owner", device.workspaces * streams // 2, f"kept by cuBLAS, {told}"),
            PlanRow("context", "context", device.context, f"the process before it holds anything, {told}"),
            PlanRow("driver growth", "context", grown, f"kernels and streams, {told}"),
            PlanRow("unattributed", "unattributed", device.leftovers, "what no owner answers for, as it is now"),
        ]

    def _graph_rows(self, policy: MemoryPolicy, steps: Steps, work: Work) -> list[PlanRow]:
        if not steps.graphs or steps.form is None:
            return []
        on_host = policy.kv.place == "host"
        stage = stage_width(steps.kept) * self._stride(replace(steps.form, layers=1))
        stages = sum(2 * rows * stage for rows in captured_batches(steps.batch)) if on_host else 0
        return [
            PlanRow("decode graphs", "owner", work.graphs, "working memory of captured decode steps"),
            PlanRow("decode graphs' page", "owner", 0 if on_host else self._stride(steps.form), "of their empty rows"),
            PlanRow(_STAGES, "owner", stages, "one layer of every row, while the next one comes from the host"),
        ]

    # parts

    def _request(self, policy: MemoryPolicy, workload: Workload) -> tuple[Steps, list[str]]:
        notes: list[str] = []
        limits = [self.kv_tokens(policy), self._context_tokens()]
        limit = min((one for one in limits if one is not None), default=None)
        prompt, kept = workload.context, workload.context + workload.new_tokens
        if limit is not None and kept > limit:
            if policy.kv.overflow == "refuse" and limits[0] == limit:
                notes.append(f"kv.overflow 'refuse' will refuse this: {kept:,} tokens are more than {limit:,}")
            else:
                notes.append(f"{kept:,} tokens are more than the {limit:,} that may be kept: it is cut to that")
                if policy.kv.overflow in ("window", "evict") and limits[0] == limit:
                    notes.append(f"kv.overflow '{policy.kv.overflow}' forgets the others (lossy)")
            kept, prompt = limit, min(prompt, limit)
        for name, field in _NEEDS.items():
            if getattr(workload, field) and name not in self.modules:
                notes.append(f"this model has no {name}: {field.split('_')[0]} of the workload are left out")
            elif getattr(workload, field) and _residency(policy, name) == "off":
                notes.append(f"a request with {field.split('_')[0]} is refused: the policy keeps {name} off")
        chunk, allowed = policy.kv.chunk, self.kv_tokens(policy)
        if allowed is not None:
            chunk = chunk_within(policy.kv, allowed, workload.context)
        form = self._form(policy)
        graphs = self.device.kind == "cuda" and policy.kv.graphs and form is not None
        return Steps(form, prompt, kept, chunk, workload.conversations, graphs), notes

    def _media(self, workload: Workload) -> list[Medium]:
        return [name for name, field in _NEEDS.items() if getattr(workload, field) and name in self.modules]

    def _form(self, policy: MemoryPolicy) -> PageFormat | None:
        return None if self._pages is None else self._pages.at(policy.kv.precision)

    def _stride(self, form: PageFormat) -> int:
        grain = _GRAIN if self.device.kind == "cuda" else 4096
        return -(-form.nbytes // grain) * grain

    def _kv(self, steps: Steps, tokens: int) -> int:
        """Bytes of one conversation's keys and values in pages."""
        return 0 if steps.form is None else -(-tokens // PAGE_TOKENS) * self._stride(steps.form)

    def _in_chunks(self, nbytes: int) -> int:
        return -(-nbytes // _CHUNK) * _CHUNK if self.device.kind == "cuda" else nbytes

    def _on_host(self, policy: MemoryPolicy, workload: Workload, steps: Steps) -> int:
        """Bytes of the host beside a GPU: keys and values, weights that stay there, copies of modules that come off."""
        if self.device.kind == "cpu":
            return 0
        answers = policy.kv.place == "host" and workload.training is None
        kv = self._kv(steps, steps.kept) * workload.conversations if answers else 0
        weights = self._weights.under(policy)
        parts = [(nbytes, policy.module(name)) for name, nbytes in weights.slabs.items()]
        return (
            kv
            + weights.on_host
            + sum(nbytes for nbytes, part in parts if part.residency != "keep" and part.park_to != "disk")
        )

    def _activations_on_host(self, policy: MemoryPolicy, workload: Workload) -> int:
        if workload.training is None or self.device.kind == "cpu" or not policy.training.offload:
            return 0
        step, _ = self._step_cost(policy, workload.training)
        if step is None:
            return 0
        return step.on_host(self._training.kept(policy.training, self.recompute(policy, workload.training)))

    def _kv_rows(self, policy: MemoryPolicy, nbytes: int, name: str = "KV") -> list[PlanRow]:
        on_host = policy.kv.place == "host" and self.device.kind == "cuda"
        nbytes = self._in_chunks(nbytes)
        return [] if on_host or not nbytes else [PlanRow(name, "kv", nbytes, "keys and values in whole pages")]

    def _context_tokens(self) -> int | None:
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def _notes(self, policy: MemoryPolicy, workload: Workload) -> tuple[str, ...]:
        notes = []
        if workload.training is not None:
            step, failed = self._step_cost(policy, workload.training)
            notes += [failed] if failed else ["all dialogues count as equally long, and all of their tokens as learnt"]
            if step is not None:
                kept = self._training.kept(policy.training, self.recompute(policy, workload.training))
                forward, backward = step.passes(kept, moves=self.device.kind == "cuda")
                notes.append(f"activations: {format_bytes(forward)} forward, {format_bytes(backward)} backward")
        if self.device.estimated:
            notes.append("estimated: context, workspaces and kernels were measured on another kind of device")
        return tuple(notes)


_known: dict[tuple[str, str, str, str], Planner] = {}
_MOST_KNOWN = 4


def planner(outline: Outline, device: PlanDevice) -> Planner:
    """The planner of a model on a kind of device; what an earlier one of the same shapes has learnt is used again."""
    precisions = json.dumps(precisions_of(outline.model), sort_keys=True)
    key = outline.model.config.to_json_string(use_diff=False), str(outline.dtype), device.kind, precisions
    found = _known.pop(key, None)
    if found is None:
        found = Planner(outline, device)
        while len(_known) >= _MOST_KNOWN:
            del _known[next(iter(_known))]
    _known[key] = found
    named = found.of(device)
    named.name = outline.name
    return named


def _residency(policy: MemoryPolicy, name: str) -> str:
    return policy.module(name).residency


def _encoder_rows(nbytes: int) -> list[PlanRow]:
    return [PlanRow("encoder outputs", "owner", nbytes, "what the encoders gave for the images and sounds")]


def _work(peak: Peak) -> list[PlanRow]:
    return [
        PlanRow("activations", "activations", peak.allocated, "tensors of a step, traced on the model's own code"),
        PlanRow("allocator cache", "allocator cache", peak.cached, "what the allocator holds around them"),
        PlanRow(
            "left in the cache", "allocator cache", peak.left, "of earlier phases; goes where memory is short", True
        ),
    ]
