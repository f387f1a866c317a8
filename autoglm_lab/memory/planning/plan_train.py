"""What a training step needs: adapters, gradients and the optimiser's states from shapes, activations from a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autoglm_lab.memory.planning.allocator_model import AllocatorModel
from autoglm_lab.memory.planning.tape import Tape
from autoglm_lab.memory.planning.traced_model import Kind
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.memory.planning.training_trace import TrainingTape, trace, trace_loss
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.decoder_layers import core_of, decoder_layers, linear_layers
from autoglm_lab.models.loading import Outline
from autoglm_lab.models.precision import check_can_learn, made_in, precisions_of
from autoglm_lab.policy import TrainingPolicy
from autoglm_lab.schedule import LEAST_BYTES, Keeping, keepings, recomputed

_LAYERS = 3
_LOSS_CHUNK, _SLICES = 256, 3
"""The slices in which a step is traced, and of how many the loss alone is: each is as the one before."""
_BLOCK, _LEAST_8BIT = 256, 4096
"""torchao's 8-bit states: values that share a scale, and the smallest tensor that has them."""


@dataclass(frozen=True, slots=True)
class Learning:
    """What stands on the device for all of a training. Bytes.

    Attributes:
        adapters: 0 where the weights themselves learn.
        gradients: of all that learns.
        states: of the optimiser, after its first step.
    """

    adapters: int
    gradients: int
    states: int


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a micro-batch needs, by what its layers keep. Bytes.

    Attributes:
        layer: what a layer keeps for the backward pass.
        movable: of that, what may wait on the host.
        given: the input of a layer.
        rest: what is kept beside the layers.
        loss: needed for the loss beyond what is kept.
        backward: needed to go back through a layer beyond what is kept.
        tail: the most at the end of the backward pass.
        again: needed beyond that to go back through a layer that runs again.
        cached: what the allocator holds around the tensors where no layer runs again.
        rerun: the same where some do; it hardly grows with them.
        cached_layer: further bytes for each layer that keeps everything.
    """

    layer: int
    movable: int
    given: int
    rest: int
    loss: int
    backward: int
    tail: int
    again: int
    cached: int
    rerun: int
    cached_layer: int

    def reserved(self, kept: Sequence[Keeping], *, moves: bool) -> int:
        """The most bytes that the allocator takes from the device; see `peak`."""
        whole = sum(not one.recompute for one in kept)
        around = self.cached if whole == len(kept) else self.rerun
        return self.peak(kept, moves=moves) + max(0, around + whole * self.cached_layer)

    def peak(self, kept: Sequence[Keeping], *, moves: bool) -> int:
        """The most bytes in tensors at a time."""
        return max(self.passes(kept, moves=moves))

    def passes(self, kept: Sequence[Keeping], *, moves: bool) -> tuple[int, int]:
        """The most bytes in tensors at a time: until the loss is there, and from then on.

        Args:
            moves: whether the host is other memory than the device.
        """
        sizes = [self._kept(one, moves=moves) for one in kept]
        total = self.rest + sum(sizes)
        forward, found = total + self.loss, [self.tail]
        for one, size in zip(reversed(kept), reversed(sizes), strict=True):
            again = self.layer + self.again if one.recompute else 0
            # A layer comes back from the host before it is needed, and the one before it with it.
            back = 2 * self._whole(one) if moves and one.on_host else 0
            found.append(total + self.backward + again + back)
            total -= size
        return forward, max(found)

    def on_host(self, kept: Sequence[Keeping]) -> int:
        """Bytes that wait on the host."""
        return sum(self._whole(one) for one in kept if one.on_host)

    def _whole(self, one: Keeping) -> int:
        if one.recompute:
            return self.given if self.given >= LEAST_BYTES else 0
        return self.movable

    def _kept(self, one: Keeping, *, moves: bool) -> int:
        size = self.given if one.recompute else self.layer
        return size - self._whole(one) if moves and one.on_host else size


class TrainingCosts:
    """The costs of training one model on one kind of device. Each kind of step is traced once."""

    def __init__(self, outline: Outline, kind: Kind) -> None:
        self._model: Any = outline.model
        self._dtype, self._kind = made_in(outline.model), kind
        self._precisions = precisions_of(outline.model)
        self.layers = len(decoder_layers(self._model))
        self._steps: dict[tuple[TrainingLoad, int, int], StepCost] = {}
        self._losses: dict[tuple[int, int], tuple[int, int]] = {}

    def learning(self, load: TrainingLoad, optimizer: str) -> Learning:
        """What stands for all of the training, counted as training allocates it.

        Raises:
            TrainingError: the weights are to learn themselves, and are kept so that they cannot.
        """
        if load.method == "lora":
            found = [self._model.get_submodule(name) for name in linear_layers(self._model)]
            shapes = [(count * load.rank, 4) for one in found for count in _ends(one)]
        else:
            check_can_learn(self._model, ("text",))
            names = {name for spec in anatomy(self._model) if spec.name == "text" for name in spec.tensors}
            learns = (value for name, value in self._model.named_parameters() if name in names)
            shapes = [(value.numel(), value.element_size()) for value in learns]
        nbytes = sum(count * size for count, size in shapes)
        states = sum(_states(count, size, optimizer) for count, size in shapes)
        return Learning(nbytes if load.method == "lora" else 0, nbytes, states)

    def step(self, load: TrainingLoad, policy: TrainingPolicy) -> StepCost:
        """What one micro-batch needs.

        Raises:
            Exception: the model's own code, which is run here, does not take tensors without data.
        """
        alone = core_of(self._model) is not None
        key = load, policy.micro_batch, _LOSS_CHUNK if alone else policy.loss_chunk
        if key not in self._steps:
            self._steps[key] = self._traced(*key)
        step, rows = self._steps[key], policy.micro_batch * (load.tokens - 1)
        if not alone or min(policy.loss_chunk, rows) == min(_LOSS_CHUNK, rows):
            return step
        # Of a step only the loss depends on how it is cut.
        some = min(rows, _SLICES * max(policy.loss_chunk, _LOSS_CHUNK))
        (loss, around), (before, around_before) = (self._loss(some, one) for one in (policy.loss_chunk, _LOSS_CHUNK))
        more = around - around_before
        return replace(step, loss=step.loss + loss - before, cached=step.cached + more, rerun=step.rerun + more)

    def _loss(self, rows: int, chunk: int) -> tuple[int, int]:
        """The most bytes in tensors, and what the allocator holds around them."""
        if (rows, chunk) not in self._losses:
            tape = trace_loss(self._model.config, self._dtype, self._kind, rows, chunk, precisions=self._precisions)
            self._losses[rows, chunk] = tape.peak, self._cached(tape)
        return self._losses[rows, chunk]

    def _cached(self, tape: Tape) -> int:
        if self._kind == "cpu":
            return 0
        allocator = AllocatorModel()
        allocator.play(tape)
        return allocator.reserved - allocator.peak_allocated

    def kept(self, policy: TrainingPolicy, recompute: frozenset[int] | None = None) -> tuple[Keeping, ...]:
        """What each layer keeps under a policy; where it is ``auto``, ``recompute`` is what is computed again."""
        if policy.checkpointing != "auto":
            recompute = recomputed(self.layers, policy.checkpointing, policy.every)
        return keepings(self.layers, recompute or frozenset(), policy.offload)

    def mildest(self, step: StepCost, policy: TrainingPolicy, room: int) -> frozenset[int]:
        """The fewest layers computed again, as training tries them, with which a step takes ``room`` bytes at most."""
        half, every = recomputed(self.layers, "every-k", 2), recomputed(self.layers, "every-layer", 1)
        for chosen in (frozenset[int](), half):
            if step.reserved(self.kept(policy, chosen), moves=self._kind == "cuda") <= room:
                return chosen
        return every

    def _traced(self, load: TrainingLoad, micro_batch: int, loss_chunk: int) -> StepCost:
        def traced(layers: int, *, recompute: bool = False) -> TrainingTape:
            return trace(
                self._model.config, self._dtype, self._kind, layers, load, micro_batch=micro_batch,
                loss_chunk=loss_chunk, recompute=recompute, precisions=self._precisions,
            )  # fmt: skip

        few, more, again = traced(_LAYERS), traced(2 * _LAYERS), traced(2 * _LAYERS, recompute=True)
        layer, movable = ((b - a) // _LAYERS for a, b in ((few.kept, more.kept), (few.large, more.large)))
        text = self._model.config.get_text_config()
        given = micro_batch * load.tokens * int(text.hidden_size) * self._dtype.itemsize
        low = self._cached(few.tape)
        each = max(0, self._cached(more.tape) - low) // _LAYERS
        step = StepCost(
            layer=layer,
            movable=movable,
            given=given,
            rest=few.kept - _LAYERS * layer,
            loss=few.loss - few.kept,
            backward=max(0, few.top - few.kept),
            tail=few.tail,
            again=0,
            cached=low - _LAYERS * each,
            rerun=self._cached(again.tape),
            cached_layer=each,
        )
        told = step.peak((Keeping(recompute=True),) * (2 * _LAYERS), moves=False)
        return replace(step, again=max(0, again.top - told))


def _ends(linear: nn.Module) -> tuple[int, int]:
    inside, outside = linear.in_features, linear.out_features
    assert isinstance(inside, int)
    assert isinstance(outside, int)
    return inside, outside


def _states(count: int, size: int, optimizer: str) -> int:
    """Bytes of both states and of the step's number of one tensor."""
    if optimizer == "adamw-8bit" and count >= _LEAST_8BIT and count % _BLOCK == 0:
        return 2 * (count + 4 * (count // _BLOCK) + 4 * 256) + 4
    return 2 * count * size + 4
