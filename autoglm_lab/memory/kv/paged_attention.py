"""Attention over pages, as transformers calls it: registered under a name of its own, used for our steps alone.

While `paged` is active in a thread, the decoder's layers call `_attend`. Whoever runs the model beside that, in another
thread, gets transformers' own sdpa under the same name.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from autoglm_lab.memory.kv.observing_cache import ObservingCache
from autoglm_lab.memory.kv.paged_cache import GraphCache, PagedCache

NAME = "autoglm_lab_pages"
_here = threading.local()
# What changes attention's result beyond queries, keys, values and a causal mask.
_EXTRAS = ("position_bias", "softcap", "s_aux", "sliding_window")


def decoder_configs(model: nn.Module) -> tuple[PreTrainedConfig, ...]:
    """The configurations that the decoder's layers ask for their attention; empty where it is not sdpa."""
    if not getattr(model, "_supports_attention_backend", True):
        return ()  # its layers compute attention themselves, whatever is registered (Falcon)
    get_decoder = getattr(model, "get_decoder", None)
    try:
        decoder = model if get_decoder is None else get_decoder()
    except (AttributeError, NotImplementedError, TypeError):
        decoder = model
    others = _encoder_configs(model)
    found = {
        id(module.config): module.config
        for module in decoder.modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig) and type(module.config) not in others
    }
    configs: tuple[PreTrainedConfig, ...] = tuple(found.values())  # type: ignore[arg-type]
    plain = all(getattr(config, "_attn_implementation", None) == "sdpa" for config in configs)
    return configs if plain else ()


def _encoder_configs(model: nn.Module) -> set[type[PreTrainedConfig]]:
    """What configures parts that are no decoder; in some families they lie inside it (Phi-4-multimodal)."""
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return set()
    text = config.get_text_config()
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return {type(part) for part in parts if isinstance(part, PreTrainedConfig)} - {type(text), type(config)}


@contextlib.contextmanager
def paged(configs: tuple[PreTrainedConfig, ...], cache: PagedCache | GraphCache) -> Iterator[None]:
    """Let the layers with these configurations read ``cache`` by pages, in this thread."""
    _here.cache = cache
    for config in configs:
        config._attn_implementation_internal = NAME  # noqa: SLF001 - the setter would also change the encoders'
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = "sdpa"  # noqa: SLF001
        _here.cache = None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Queries ``[batch, heads, new, head_dim]``; the result is ``[batch, new, heads, head_dim]``."""
    cache = getattr(_here, "cache", None)
    if cache is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    plain = attention_mask is None and all(kwargs.get(name) is None for name in _EXTRAS)
    if isinstance(cache, ObservingCache):
        cache.observe(query, scale)
    elif plain:
        over_pages = cache.attend(query, scale)
        if over_pages is not None:
            return over_pages, None
    keys, values = cache.read()
    new, longest = query.shape[2], keys.shape[2]
    if plain and new > 1 and _flash(query):
        return _flash_attention(query, keys, values, scale), None
    if plain and new == 1 and isinstance(cache, PagedCache):
        attention_mask = cache.mask(query.dtype, additive=False)
    elif plain and longest > new:
        attention_mask = _last_rows(new, longest, query.device)
        if cache.on_cpu:
            return _grouped(query, keys, values, attention_mask, scale), None
    return sdpa_attention_forward(module, query, keys, values, attention_mask, 0.0, scaling, **kwargs)


def _flash(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def _flash_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    if query.shape[2] == keys.shape[2]:
        whole = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
        return whole.transpose(1, 2)
    # The new tokens are the last ones: the kernel aligns its causal mask there, but sdpa never asks it to.
    flash = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001 - a public call aligns it elsewhere
    result = flash(query, keys, values, 0.0, True, scale=scale)
    attended: Tensor = result[0]
    return attended.transpose(1, 2)


def _grouped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What sdpa gives, without copies of keys and values for every head of a group, which a CPU's kernel needs not."""
    attended = functional.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


def _last_rows(new: int, longest: int, device: torch.device) -> Tensor:
    """What each of the last ``new`` of ``longest`` tokens may see: ``bool [1, 1, new, longest]``."""
    rows = torch.arange(longest - new, longest, device=device)
    return (torch.arange(longest, device=device)[None] <= rows[:, None])[None, None]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None where only causality masks, which `_attend` knows; else what sdpa gets."""
    if getattr(_here, "cache", None) is not None and kwargs.get("allow_is_causal_skip", True):
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
