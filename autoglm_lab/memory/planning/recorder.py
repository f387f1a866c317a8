"""Runs a model's own code on tensors without data and records what it allocates.

Tensors that hang on weights are fake: they have a shape and no numbers. Small tensors that do not (ids, positions,
sizes of images) are real, so that code which looks at their values goes the way it really would.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from autoglm_lab.memory.planning.tape import Tape

_MOST_REAL = 1 << 20
"""Elements of the largest tensor that is real."""
_FEW = 4096
"""Elements of inputs that cannot make a large tensor, but for a mask of every pair."""
_CHANNELS = 8
"""Of half-precision numbers that a tensor core reads at once."""
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


def without_data(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the parameters of ``model`` by fake ones on the CPU; ties stay. Buffers stay as they are."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in replaced:
                with mode:
                    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype)
                replaced[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, replaced[id(parameter)])


class Recorder(TorchDispatchMode):
    """While it is active, every storage that comes to be and goes is written down.

    Args:
        mode: of the fake tensors.
        model: what it holds is not written down.
    """

    def __init__(self, mode: FakeTensorMode, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._order: list[int] = []
        self._sizes: list[int] = []
        held = (*model.parameters(), *model.buffers())
        self._known = {tensor.untyped_storage()._cdata for tensor in held}  # noqa: SLF001 - as in `_note`

    def ignore(self, *tensors: Tensor) -> None:
        """Leave out tensors that are there already."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}  # noqa: SLF001 - as in `_note`

    @property
    def position(self) -> int:
        """How much has happened so far."""
        return len(self._order)

    @property
    def tape(self) -> Tape:
        return Tape(tuple(self._order), tuple(self._sizes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(one, FakeTensor) for one in given):
            return self._indexed(func, args, kwargs)
        views = any(one.alias_info is not None for one in func._schema.returns)  # noqa: SLF001 - told nowhere else
        if given and (views or sum(one.numel() for one in given) <= _FEW):
            return func(*args, **kwargs)
        faked_args, faked_kwargs = tree_map_only(Tensor, self._mode.from_tensor, (args, kwargs))
        try:
            with self._mode:
                faked = func(*faked_args, **faked_kwargs)
        except (RuntimeError, NotImplementedError):  # it looks at values
            return func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(faked) if isinstance(leaf, Tensor)]
        small = all(one.numel() <= _MOST_REAL for one in (*made, *given))
        return func(*args, **kwargs) if small else faked

    def _indexed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Masks that are real say how much they select, which fake ones cannot."""
        if func is torch.ops.aten.index.Tensor:
            source, indices = args
            spelled: list[Any] = []
            for index in indices:
                if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
                    found = index.nonzero()
                    self._note(found)
                    spelled += list(found.unbind(1))
                else:
                    spelled.append(index)
            args = source, spelled
        if func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001 - the name of the operation
            return 0
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - its only identity
        if key in self._known:
            return
        self._known.add(key)
        at = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._order.append(at)
        weakref.finalize(storage, self._forget, key, at).atexit = False

    def _forget(self, key: int, at: int) -> None:
        self._known.discard(key)
        self._order.append(~at)


class DeviceKernels(TorchFunctionMode):
    """Attention and convolutions as the device would compute them: what they allocate, no numbers.

    Attention on CUDA: half precision without a mask is FlashAttention; the rest, where keys have as many heads as
    queries, is cuDNN's kernel in half precision and the memory-efficient one in float32; what is left is written out as
    matrices. On a CPU it is the flash kernel of torch.
    Convolutions on CUDA in half precision: cuDNN brings input and weight into the order of its tensor cores, where
    their channels fill these, and the result back where it is more than one place. Norms of layers read a copy of what
    is not contiguous.
    """

    def __init__(self, kind: Literal["cuda", "cpu"]) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return self._attend(*args, **kwargs)
        copied = None
        if func is functional.layer_norm and self._kind == "cuda" and args and isinstance(args[0], FakeTensor):
            copied = args[0].contiguous()
        result = func(*args, **kwargs)
        del copied
        if func in _CONVOLUTIONS and self._kind == "cuda" and isinstance(result, FakeTensor):
            _work_of_convolution(args[0], args[1], result)
        return result

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        del dropout_p, is_causal, scale
        fits, half = query.shape[-1] <= 256, query.dtype in (torch.float16, torch.bfloat16)
        if self._kind == "cuda" and attn_mask is None and fits and half:
            return flash(query, value)
        grouped = query.shape[1] != key.shape[1]
        if self._kind == "cpu" or not grouped:
            bias = _bias(attn_mask, query)
            laid_out = flash if self._kind == "cpu" else _as_query if half else _by_token
            made = laid_out(query, value)
            del bias
            return made
        if enable_gqa:
            key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
        bias = _bias(attn_mask, query)
        scores = query @ key.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        return torch.softmax(scores, -1) @ value


def _work_of_convolution(given: Tensor, weight: Tensor, result: Tensor) -> None:
    if result.dtype not in (torch.float16, torch.bfloat16) or given.shape[1] % _CHANNELS:
        return
    places = result[0, 0].numel()
    nbytes = given.nbytes + weight.nbytes + (result.nbytes if places > 1 else 0)
    result.new_empty(nbytes, dtype=torch.uint8)


def _by_token(query: Tensor, value: Tensor) -> Tensor:
    """The result of attention as the memory-efficient kernel lays it out: all heads of a token together."""
    batch, heads, new, _ = query.shape
    return query.new_empty(batch, new, heads, value.shape[-1]).transpose(1, 2)


def _as_query(query: Tensor, value: Tensor) -> Tensor:
    """The result of attention as cuDNN lays it out: in the order of the queries' dimensions in memory."""
    order = sorted(range(4), key=query.stride, reverse=True)
    sizes = (*query.shape[:3], value.shape[-1])
    result = query.new_empty([sizes[dim] for dim in order])
    return result.permute([order.index(dim) for dim in range(4)])


def flash(query: Tensor, value: Tensor) -> Tensor:
    """What FlashAttention allocates for queries ``[batch, heads, new, head_dim]``: the result and a sum a row."""
    batch, heads, new, dim = query.shape
    padded = -(-dim // 8) * 8
    copies = [query.new_empty(*query.shape[:-1], padded) for _ in range(3)] if padded != dim else []
    result = query.new_empty(batch, new, heads, padded)[..., : value.shape[-1]].transpose(1, 2)
    sums = query.new_empty(batch, heads, new, dtype=torch.float32)
    del copies, sums
    return result


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return mask.to(query.dtype) if mask is not None and mask.dtype == torch.bool else mask


@contextlib.contextmanager
def recording(mode: FakeTensorMode, model: nn.Module, kind: Literal["cuda", "cpu"]) -> Iterator[Recorder]:
    """Record what is done meanwhile, as on a device of that kind."""
    recorder = Recorder(mode, model)
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad(), DeviceKernels(kind), recorder:
            yield recorder
    finally:
        if collects:
            gc.enable()
