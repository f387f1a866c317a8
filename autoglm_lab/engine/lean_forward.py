"""The same forward in less memory and fewer kernels, for our steps alone.

Feed-forward layers look at each token by itself, so a long chunk goes through them in slices: their inner width is
what a prefill's peak is made of. Root-mean-square norms are one kernel instead of eight. Both are tried out on numbers
before they stand in for a module, and only where its result is the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autoglm_lab.models.lean_layers import feed_forwards, norm_of, rms_norms
from autoglm_lab.models.quantized_linear import QuantizedLinear
from autoglm_lab.schedule import FEED_FORWARD_TOKENS as SLICE


class LeanForward:
    """Stands in for some modules of a model's decoder while it is active. Only the engine's thread uses it."""

    def __init__(self, model: Any) -> None:
        device: torch.device = model.device
        self._on_cuda = device.type == "cuda"
        self._modules = feed_forwards(model)
        self._norms = rms_norms(model) if self._on_cuda and _has_triton() else []
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] | None = None

    @property
    def tried(self) -> bool:
        """Whether it is known what may stand in."""
        return self._forwards is not None

    def forget(self) -> None:
        """Try again at the next use: what was tried may have failed for another reason."""
        self._forwards = None

    def prepare(self) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """What stands in for what; tried out at the first call."""
        if self._forwards is None:
            self._forwards = self._tried()
        return self._forwards

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the modules compute the lean way."""
        forwards = self.prepare()
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in forwards:
                module.__dict__.pop("forward", None)

    @staticmethod
    def norm_shapes(model: Any) -> set[tuple[int, torch.dtype]]:
        """Widths and dtypes of the decoder's root-mean-square norms."""
        weights = [getattr(module, "weight", None) for module in rms_norms(model)]
        return {(weight.shape[-1], weight.dtype) for weight in weights if isinstance(weight, Tensor)}

    @staticmethod
    def compile_norms(shapes: set[tuple[int, torch.dtype]], device: torch.device) -> None:
        """Compile the kernel that stands in for norms of these widths and dtypes."""
        from autoglm_lab.engine.norm_kernel import rms_norm

        for width, dtype in shapes:
            ones = torch.ones(1, width, dtype=dtype, device=device)
            rms_norm(ones, ones[0], 1e-6)

    def _tried(self) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """What may stand in: one module of each class and size is tried for all of them."""
        verdicts: dict[Any, bool] = {}
        found = []
        for modules, make in ((self._modules, _sliced), (self._norms, _fused)):
            for module in modules:
                if "forward" in module.__dict__:  # someone else's stand-in: a hook of accelerate's, an adapter
                    continue
                width = _width(module)
                if width is None:
                    continue
                forward = make(module)
                kind = type(module), width
                if kind not in verdicts:
                    verdicts[kind] = _same(module, forward, width)
                if verdicts[kind]:
                    found.append((module, forward))
        if self._modules and self._on_cuda:
            torch.cuda.empty_cache()  # trials leave blocks of other sizes than steps need
        return found


def _width(module: nn.Module) -> int | None:
    """Of its input; None: it has no weights that would tell, as some families' norms of values."""
    linear = next((child for child in module.modules() if isinstance(child, nn.Linear)), None)
    if linear is not None:
        return int(linear.in_features)
    weight = next(module.parameters(), None)
    return None if weight is None else int(weight.shape[-1])


def _sliced(module: nn.Module) -> Callable[[Tensor], Tensor]:
    forward = type(module).forward.__get__(module)

    def run(hidden: Tensor) -> Tensor:
        if hidden.shape[-2] <= SLICE:
            return forward(hidden)  # type: ignore[no-any-return]
        result = torch.empty_like(hidden)
        for start in range(0, hidden.shape[-2], SLICE):
            result[..., start : start + SLICE, :] = forward(hidden[..., start : start + SLICE, :])
        return result

    return run


def _fused(module: nn.Module) -> Callable[[Tensor], Tensor]:
    from autoglm_lab.engine.norm_kernel import rms_norm

    weight, epsilon = norm_of(module)

    def run(hidden: Tensor) -> Tensor:
        return rms_norm(hidden, weight, epsilon)

    return run


@torch.no_grad()
def _same(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether both give the same for made-up numbers, to the rounding of their dtype."""
    parameter = _computes_in(module)
    generator = torch.Generator(device=parameter.device).manual_seed(0)
    tokens = SLICE + 3 if isinstance(next(module.children(), None), nn.Linear) else 3
    given = torch.randn(1, tokens, width, generator=generator, device=parameter.device).to(parameter.dtype)
    try:
        expected, result = module(given), forward(given)
    except Exception:  # noqa: BLE001 - a stand-in that fails, for whatever reason, does not stand in
        return False
    if expected.shape != result.shape or expected.dtype != result.dtype:
        return False
    rounding = 4 * torch.finfo(parameter.dtype).eps
    difference = (expected.float() - result.float()).abs().max()
    return bool(difference <= rounding * expected.float().abs().max())


def _computes_in(module: nn.Module) -> Tensor:
    """A tensor of the dtype that a module computes in, on its device."""
    parameter = next((one for one in module.parameters() if one.is_floating_point()), None)
    if parameter is not None:
        return parameter
    layer = next(one for one in module.modules() if isinstance(one, QuantizedLinear))
    return torch.empty(0, dtype=layer.dtype, device=layer.packed.device)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
