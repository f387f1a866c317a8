"""Fine-tuning on the engine's thread: what is prepared, what is watched, what happens when memory runs out."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from autoglm_lab.engine.messages import AudioPart, ImagePart, Message
from autoglm_lab.engine.recovery import evict, free_all, is_out_of_memory
from autoglm_lab.engine.state import EngineState
from autoglm_lab.errors import EngineClosedError, OutOfMemoryError, TrainingError
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.models.decoder_layers import decoder_layers
from autoglm_lab.models.precision import check_can_learn
from autoglm_lab.training.adapters import Adapters, chosen_layers
from autoglm_lab.training.course import Course
from autoglm_lab.training.dataset import Dataset, Problem
from autoglm_lab.training.examples import Example, Examples, check_length
from autoglm_lab.training.feature_cache import FeatureCache
from autoglm_lab.training.loop import Learnt, Loop, arguments, latest, optimizer_of, quietly
from autoglm_lab.training.novelty import inputs_of, novel_directions
from autoglm_lab.training.run import TrainingResult, TrainingRun
from autoglm_lab.training.running_mean import RunningMean
from autoglm_lab.training.settings import StepSettings
from autoglm_lab.training.step import Step
from autoglm_lab.training.step_peaks import StepPeaks

ENCODERS = ("vision", "audio", "projector")


class Finetuning:
    """One fine-tuning of a model. `job` is what the engine runs.

    Args:
        state: of the engine that has the model.
        adapters: of the model.
        register, unregister: owners of the ledger.
        recompute: tells the layers that ``auto`` computes again from the start, None where it cannot; None: none are
            until memory runs out.
    """

    def __init__(
        self,
        state: EngineState,
        adapters: Adapters,
        dataset: Dataset,
        course: Course,
        *,
        register: Callable[[Any], None],
        unregister: Callable[[Any], None],
        recompute: Callable[[TrainingLoad], frozenset[int] | None] | None = None,
    ) -> None:
        self._state, self._adapters, self._dataset, self._course = state, adapters, dataset, course
        self._register, self._unregister, self._recompute = register, unregister, recompute
        self._policy = state.policy.training
        batch = self._policy.micro_batch * self._policy.accumulation
        self.run = TrainingRun(course.name, course.total_steps(len(dataset), batch))
        self.run.problems = tuple(map(str, dataset.problems))
        self._settings = StepSettings.of(self._policy, len(decoder_layers(state.model)))
        self._features = FeatureCache(state.accelerator.device) if self._caches() else None
        self._passes = StepPeaks(state.accelerator.device)
        self.run.activations = self._passes.most
        self._gradients = self._states = 0
        self._closing = self._settled = False
        self.last_loss = 0.0

    def job(self, between: Callable[[], bool]) -> TrainingResult:
        """All of it, on the engine's thread. Afterwards the model answers with what it has learnt."""
        self._between = between
        try:
            with torch.inference_mode(mode=False), self._prepared():
                return self._train()
        except BaseException as error:
            self.run.tell("failed", str(error))
            raise

    def holdings(self) -> Iterator[Row]:
        """The ledger's rows of what training adds, adapters and activations apart."""
        if self._gradients:
            counts = "gradients of the weights that learn"
            yield Row("gradients", "owner", "device", self._gradients, counts, within="allocator")
        yield from self._passes.holdings()
        if self._states:
            counts = f"states of the optimiser ({self._policy.optimizer})"
            yield Row("optimiser states", "owner", "device", self._states, counts, within="allocator")
        if self._features is not None:
            yield from self._features.holdings()

    def _caches(self) -> bool:
        course, state = self._course, self._state
        if course.method == "full":
            learns = set(course.modules)
        else:
            chosen = tuple(f"{name}." for name in chosen_layers(state.model, course.targets))
            specs = state.residency.specs
            learns = {spec.name for spec in specs if any(name.startswith(chosen) for name in spec.tensors)}
        self._learns = learns
        return self._policy.cache_features and not learns & set(ENCODERS)

    # what stands around the steps

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """The model for itself: nothing kept of other weights, what learns asking for gradients, all else frozen."""
        state = self._state
        self.run.tell("preparing", "reading the data")
        forget_answers(state, "the model is trained")
        self._register(self)
        parked: list[str] = []
        model = state.model
        model.eval()
        asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        try:
            model.requires_grad_(False)
            self._examples = Examples(model, state.processor, self._features, all_answers=self._course.all_answers)
            self._data = list(self._read())
            parked = self._park_idle()
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(asked.get(name, False))
                parameter.grad = None
            self._passes.enter("")
            self._gradients = self._states = 0
            self._unregister(self)
            state.enter("idle")
            if not self._closing:
                state.reclaim("training is over")  # before the encoders come back: both may be more than there is
                for name in parked:
                    state.residency[name].wake("training is over")
                forget_answers(state, "the model was trained")
                state.prepare_steps()

    def _read(self) -> Iterator[Example]:
        """The examples, media encoded; lines that the model cannot take are left out and named."""
        state, problems = self._state, list(self.run.problems)
        state.enter("encode", self.run.peaks)
        state.residency.ensure([name for name in state.residency if name not in ENCODERS], "training data")
        keeps = self._dataset.kept or (False,) * len(self._dataset)
        for line, messages, kept in zip(self._dataset.lines, self._dataset, keeps, strict=True):
            try:
                state.residency.ensure(self._encoders_of(messages), f"line {line} of the training data")
                example = replace(self._examples.example(messages), kept=kept)
                check_length(example, self._course.max_tokens or state.context_tokens, line)
            except ValueError as error:
                problems.append(str(Problem(line, str(error).removeprefix(f"line {line}: "))))
                continue
            finally:
                self._pause()
            yield example
        self.run.problems = tuple(problems)
        state.enter("idle")

    def _encoders_of(self, messages: Sequence[Message]) -> list[str]:
        """The modules beside the decoder that a dialogue has work for."""
        kinds = {type(part) for message in messages for part in message.parts}
        needs = [name for kind, name in ((ImagePart, "vision"), (AudioPart, "audio")) if kind in kinds]
        return [name for name in (*needs, *["projector"] * bool(needs)) if name in self._state.residency]

    def _park_idle(self) -> list[str]:
        """Park the encoders that no step will run. Returns those that were on the device."""
        if not self._data:
            raise TrainingError(f"no dialogue of {self._dataset.name} can be learnt from; {self.run.problems[0]}")
        state = self._state
        raw = {run.kind for one in self._data if one.media is None for run in one.prompt.runs}
        needed = {"image": "vision", "audio": "audio"}
        unneeded = [module for kind, module in needed.items() if kind not in raw and module not in self._learns]
        idle = [module for module in unneeded if module in state.residency]
        parked = [name for name in idle if state.residency[name].place == "device"]
        for name in parked:
            state.residency[name].park(state.policy.module(name).park_to, "training does not need it")
        state.residency.settle()
        self._needed = [name for name in state.residency if name not in idle]
        return [name for name in parked if state.policy.module(name).residency == "keep"]

    # the steps

    def _learning(self) -> dict[str, nn.Parameter]:
        """What learns, by name; adapters are made here."""
        course, state = self._course, self._state
        if course.method == "full":
            unknown = [name for name in course.modules if name not in state.residency]
            if unknown:
                raise TrainingError(f"this model has no module '{unknown[0]}': it has {', '.join(state.residency)}")
            check_can_learn(state.model, course.modules)
            specs = {name for spec in state.residency.specs if spec.name in course.modules for name in spec.tensors}
            found = {name: value for name, value in state.model.named_parameters() if name in specs}
        else:
            if course.name not in self._adapters.names:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(course.seed)
                    self._adapters.add(course.name, rank=course.rank, alpha=course.alpha, targets=course.targets)
                self._made = True
            self._adapters.switch(on=True)
            found = self._adapters.parameters(course.name)
        for parameter in found.values():
            parameter.requires_grad_(True)
        return found

    def _begin_with_what_is_new(self) -> None:
        """Let the adapter read its layers' inputs where what is to be learnt differs from what is to be kept."""
        new, kept = ([one for one in self._data if one.kept is keep] for keep in (False, True))
        if not new or not kept:
            return
        self.run.tell("preparing", "looking at what is new")
        self._state.residency.ensure(self._needed, "a look at the data")

        def look(dialogue: Example) -> None:
            if not self.run.stopping:
                self._step.look(dialogue)
            self._pause()

        course = self._course
        layers = self._adapters.layers(course.name)
        newer, older = (inputs_of(layers, dialogues, look, course.seed) for dialogues in (new, kept))
        if self.run.stopping:
            return
        directions = {
            name: novel_directions(newer[name], older[name], course.rank) for name in newer.keys() & older.keys()
        }
        self._adapters.read_along(course.name, directions)

    def _begun_with(self) -> StepSettings:
        """The settings of the first step: where they are ``auto``, the mildest that the plan says will fit."""
        course, settings = self._course, self._settings
        planned = course.targets is None if course.method == "lora" else course.modules == ("text",)
        limited = self._state.policy.budget is not None or self._state.accelerator.kind == "cuda"
        if self._recompute is None or self._policy.checkpointing != "auto" or not (planned and limited):
            return settings
        chosen = self._recompute(TrainingLoad(course.method, max(map(len, self._data)), course.rank))
        return settings if chosen is None else replace(settings, recompute=chosen)

    def _train(self) -> TrainingResult:
        state, course, run = self._state, self._course, self.run
        self._made = False
        self._settings = self._begun_with()
        learnt = Learnt(self._learning())
        self._step = Step(state.model, self._examples, self._settings, self._mark)
        self._learnt = learnt
        with contextlib.ExitStack() as stack:
            out = course.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autoglm-lab-")))
            batch = self._policy.micro_batch * self._policy.accumulation
            run.steps = course.total_steps(len(self._data), batch)
            told = arguments(
                out, state.accelerator.device, batch=batch, steps=run.steps, rate=course.learning_rate,
                warm_up=min(course.warm_up, run.steps // 4), schedule=course.schedule,
                weight_decay=course.weight_decay, save_every=course.save_every or run.steps + 1, seed=course.seed,
            )  # fmt: skip
            with quietly():
                optimizer = optimizer_of(self._policy.optimizer, course.learning_rate)
                mean = RunningMean(learnt.named, course.ema) if course.ema is not None else None
                loop = Loop(
                    learnt, told, self._data, self._run_step, optimizer=optimizer, callbacks=[_Watch(self)],
                    stored=self._stored, mean=mean,
                )  # fmt: skip
                last = latest(out) if course.resume else None
                if course.resume and last is None:
                    raise TrainingError(f"there is no whole checkpoint in '{out}' to resume from")
                began = run.began = time.monotonic()
                try:
                    if self._made and last is None:
                        self._begin_with_what_is_new()
                    run.tell("training", str(self._step.settings))
                    loop.train(resume_from_checkpoint=None if last is None else str(last))
                    if mean is not None:
                        mean.apply()
                except BaseException:
                    if self._made:
                        self._adapters.remove()
                    raise
            seconds = time.monotonic() - began
            stopped = run.step < run.steps
            kept = latest(out) if course.out is not None else None
        state.enter("idle")
        result = TrainingResult(
            run.step, run.loss or 0.0, seconds, run.peaks, dict(run.activations), self._step.layers.store.moved,
            str(self._step.settings), kept, stopped,
        )  # fmt: skip
        run.tell("stopped" if stopped else "done", "")
        return result

    def _run_step(self, dialogues: Sequence[Example]) -> Tensor:
        """One step; when memory runs out, the next stronger settings and the whole step once more."""
        state = self._state
        state.phase = "train"
        while True:
            state.residency.ensure(self._needed, "a training step")
            try:
                state.check_budget()
                loss = self._step.run(dialogues)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason, needed = str(error).split("\n")[0], getattr(error, "needed", None)
            else:
                self.last_loss = float(loss)
                self.run.tokens += sum(map(len, dialogues))
                return loss
            # Outside of the except clause: the traceback would keep the failed step's tensors alive.
            self._learnt.zero_grad()
            self._passes.enter("")
            stronger = self._step.settings.stronger()
            if stronger is None:
                state.event("out of memory", "train", why="gave up")
                raise OutOfMemoryError("train", needed, state.accelerator.headroom(), self._remedies())
            state.event("out of memory", "train", why=f"{reason}; now {stronger}")
            free_all(state, None, "memory ran out in training")
            self._step.settings = stronger
            self.run.tell(note=str(stronger))

    def _remedies(self) -> list[str]:
        remedies = ["shorter dialogues (max_tokens)", "a smaller rank, or fewer targets"]
        if self._policy.optimizer == "adamw":
            remedies.insert(0, "training.optimizer='adamw-8bit'")
        if self._state.policy.budget is not None:
            remedies.append("a larger budget")
        return remedies

    def _mark(self, phase: str) -> None:
        self._state.meter.enter(phase, (self.run.peaks,))
        self._passes.enter(phase)

    def _stored(self, gradients: int, states: int) -> None:
        self._passes.enter("")
        self._gradients, self._states = gradients, states

    def _pause(self) -> None:
        """Let the engine do what was asked meanwhile."""
        if not self._between():
            self._closing = True
            raise EngineClosedError("this workbench was closed while its model was trained")

    def after_step(self, step: int, loss: float) -> bool:
        """For the loop: one step is done. False: it is to stop."""
        self._gradients = 0
        # Fused optimisers write without counting; parking goes by the count.
        torch.autograd.graph.increment_version(list(self._learnt.parameters()))
        if not self._settled:  # the optimiser's states lie among what the first step freed: later steps start afresh
            self._settled = True
            self._state.accelerator.give_back()
        run = self.run
        run.step, run.seconds = step, time.monotonic() - run.began
        run.losses.append((step, loss))
        run.tell()
        self._closing = not self._between()
        return not (run.stopping or self._closing)


class _Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tells a `Finetuning` of each step."""

    def __init__(self, tuning: Finetuning) -> None:
        self._tuning = tuning

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> Any:
        del args, named
        last = self._tuning.last_loss
        if not self._tuning.after_step(state.global_step, last):
            control.should_training_stop = control.should_save = True
        return control


def forget_answers(state: EngineState, why: str) -> None:
    """Keys and values, and graphs, of weights that are not the model's any more; what was said stays."""
    for conversation in state.conversations.idle_by_age():
        evict(state, conversation, why)
    state.free_stores()
    if state.stepper.graphs is not None:
        state.stepper.graphs.clear()
