"""The tensors of one module as the model holds them: pointed at a region of memory, or at nothing while parked.

The Parameter objects stay the same throughout; only what they point at changes. While they point at nothing, hooks
catch whoever would use them.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoglm_lab.errors import ModuleError
from autoglm_lab.memory.residency.slab import lay_out, views_of
from autoglm_lab.memory.residency.streams import Streams
from autoglm_lab.models.anatomy import ModuleSpec


class Binding:
    """One module's parameters and persistent buffers inside the model.

    Args:
        spec: which tensors.
        model: none of the tensors may be on the meta device.
        device: where they are when they are somewhere.
        on_use: called before a forward pass that would use parked weights, with a description; it wakes them or raises.

    Attributes:
        views: where each tensor lies in a region.
        nbytes: of such a region.
        last_used: seconds since the epoch of the last forward pass.
    """

    def __init__(self, spec: ModuleSpec, model: nn.Module, device: torch.device, on_use: Callable[[str], None]) -> None:
        self._name, self._device, self._on_use = spec.name, device, on_use
        self._tensors = {name: _tensor_at(model, name) for name in spec.tensors}
        self.views, self.nbytes = lay_out(self._tensors)
        # Made once, so that detaching hundreds of tensors takes far less than a millisecond.
        self._absent = [
            (tensor, placeholder(view.dtype, device).expand(view.shape))
            for tensor, view in zip(self._tensors.values(), self.views.values(), strict=True)
        ]
        self.last_used = 0.0
        self._attached: list[tuple[str, Tensor, int, int]] = []
        self._streams = Streams(device)
        self._running: set[int] = set()
        self._detached = False
        self._guarded = _guarded_submodules(model, {id(tensor) for tensor in self._tensors.values()})
        self._guards: list[Any] = []
        self._hooks = [one.register_state_dict_pre_hook(self._guard_state_dict) for one in self._guarded]
        for root in spec.roots:
            submodule = model.get_submodule(root)
            self._hooks.append(submodule.register_forward_pre_hook(self._enter, prepend=True))
            self._hooks.append(submodule.register_forward_hook(self._leave, always_call=True))

    def attach(self, region: Tensor, arriving: torch.cuda.Event | None = None) -> None:
        """Point the tensors into ``region`` (``uint8``, ``[nbytes or more]``).

        Args:
            arriving: when the bytes will be there; None: they are, or what was said before holds.
        """
        self._attached = []
        for name, view in views_of(region, self.views).items():
            tensor = self._tensors[name]
            tensor.data = view
            self._attached.append((name, tensor, tensor.data_ptr(), _version(tensor)))
        if arriving is not None:
            self._streams.arriving = arriving
        self._detached = False
        for guard in self._guards:
            guard.remove()
        self._guards.clear()

    def detach(self) -> None:
        """Point the tensors at nothing, and watch for uses."""
        with torch.inference_mode(mode=False), torch.no_grad():
            for tensor, absent in self._absent:
                tensor.data = absent
        self._attached = []
        self._detached = True
        if not self._guards:
            for submodule in self._guarded:
                self._guards.append(submodule.register_forward_pre_hook(self._guard, prepend=True))

    def copies(self, region: Tensor) -> dict[str, Tensor]:
        """The values in ``region`` in memory of torch's own allocator, each tensor as it lay when it was attached."""
        made = {}
        for name, view in views_of(region, self.views).items():
            own = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=self._device)
            made[name] = own.copy_(view)
        return made

    def give_away(self, values: dict[str, Tensor]) -> None:
        """Point the tensors at ``values`` for good and take every hook off: the model is its own again."""
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.data = values[name]
        for hook in (*self._guards, *self._hooks):
            hook.remove()
        self._guards, self._hooks, self._attached, self._detached = [], [], [], False

    def join(self) -> None:
        """Let the current stream wait for weights that are on their way."""
        self._streams.enter()

    def changed(self) -> bool:
        """Whether anyone wrote to the weights since they came, by the tensors' version counters and addresses.

        A write through ``.data`` leaves no trace.

        Raises:
            ModuleError: a tensor was replaced by one of another dtype, shape or device.
        """
        changed = False
        for name, tensor, address, version in self._attached:
            view = self.views[name]
            if tensor.dtype != view.dtype or tensor.shape != view.shape or tensor.device != self._device:
                raise ModuleError(
                    f"'{self._name}' cannot be parked: {name} was replaced ({tensor.dtype} {list(tensor.shape)} on "
                    f"{tensor.device}; it was {view.dtype} {list(view.shape)}). Load the model with the dtype you want"
                )
            changed |= tensor.data_ptr() != address or _version(tensor) != version
        return changed

    def gather(self, region: Tensor) -> None:
        """Copy tensors that were pointed elsewhere to their places in ``region``."""
        for name, tensor, address, _ in self._attached:
            if tensor.data_ptr() != address:
                self.views[name].of(region).copy_(tensor.data)

    def uses(self, after: torch.cuda.Event | None = None) -> tuple[torch.cuda.Event, ...]:
        """What the device has to pass before the weights may go. See `Streams.uses`."""
        return self._streams.uses(after)

    def refuse_while_running(self) -> None:
        """Raise `ModuleError` while another thread is inside a forward pass of this module."""
        here = threading.get_ident()
        for thread in tuple(self._running):
            if thread != here and _is_in_forward(thread):
                raise ModuleError(
                    f"'{self._name}' is in use by a forward pass of another thread: try again when it is over"
                )
            if thread != here:
                self._running.discard(thread)

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        del module, arguments
        self._running.add(threading.get_ident())
        self.last_used = time.time()
        self._streams.enter()

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        del module, arguments, output
        self._running.discard(threading.get_ident())
        self._streams.leave()

    def _guard(self, module: nn.Module, arguments: Any) -> None:
        del arguments
        self._on_use(f"a forward pass of {type(module).__name__}")

    def _guard_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        del module, prefix, keep_vars
        if self._detached:
            self._on_use("its values are read by state_dict()")


def _version(tensor: Tensor) -> int:
    return int(tensor._version)  # noqa: SLF001 - torch's only count of in-place writes


def _tensor_at(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), last)
    assert isinstance(tensor, Tensor)
    return tensor


def _guarded_submodules(model: nn.Module, tensors: set[int]) -> list[nn.Module]:
    """Every submodule that holds one of ``tensors`` directly, or holds nothing but them."""
    held: dict[int, tuple[int, int]] = {}

    def count(submodule: nn.Module) -> tuple[int, int]:
        """Parameters within, and how many of them are ``tensors``: once for each submodule, a model has many."""
        if id(submodule) not in held:
            own = [id(parameter) for parameter in submodule.parameters(recurse=False)]
            parts = [count(child) for child in submodule.children()]
            every = len(own) + sum(part[0] for part in parts)
            held[id(submodule)] = every, sum(one in tensors for one in own) + sum(part[1] for part in parts)
        return held[id(submodule)]

    guarded = []
    for submodule in model.modules():
        every, ours = count(submodule)
        own = [*submodule.parameters(recurse=False), *submodule.buffers(recurse=False)]
        if (every and every == ours) or any(id(tensor) in tensors for tensor in own):
            guarded.append(submodule)
    return guarded


_placeholders: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def placeholder(dtype: torch.dtype, device: torch.device) -> Tensor:
    """One value that stands for parked weights: not a number where the dtype has that, so that a use would show."""
    key = (dtype, device)
    if key not in _placeholders:
        value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
        _placeholders[key] = torch.full((), value).to(device=device, dtype=dtype)
    return _placeholders[key]


def _is_in_forward(thread: int) -> bool:
    """Whether that thread really runs a module now: an interrupt may have skipped the hook that says it left."""
    frame = sys._current_frames().get(thread)  # noqa: SLF001 - there is no other way to look into a thread
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            return True
        frame = frame.f_back
    return False
