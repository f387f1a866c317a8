"""What a model can do where a conversation passes its limit."""

from __future__ import annotations

from typing import Any

from autoglm_lab.engine.positions import Positions
from autoglm_lab.errors import PolicyError
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.kv.paged_attention import decoder_configs
from autoglm_lab.policy import KvPolicy


def check_overflow(policy: KvPolicy, model: Any) -> None:
    """Refuse to evict by attention where a model's attention cannot be seen.

    Raises:
        PolicyError: its layers do not lie in pages, or compute attention themselves.
    """
    if policy.overflow != "evict":
        return
    if PageFormat.of(model.config, model.dtype) is None:
        reason = "this model's layers do not lie in pages"
    elif not decoder_configs(model) or not Positions(model).stated:
        reason = "this model computes its attention itself"
    else:
        return
    raise PolicyError(
        f"kv.overflow is 'evict', but {reason}, so nobody sees which tokens it attends to: set it to 'stop' or "
        "'drop-oldest-turns'"
    )
