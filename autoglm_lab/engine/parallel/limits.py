"""What several ranks cannot do together, said before it is tried."""

from __future__ import annotations

from autoglm_lab.errors import PolicyError
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import exact_bytes


def refuse_apart(policy: MemoryPolicy, before: MemoryPolicy | None = None) -> None:
    """Raise `PolicyError` where a model that several ranks hold cannot obey.

    Args:
        before: the policy until now; None: the model is still to be loaded.
    """
    if policy.placement.host_bytes:
        asked = exact_bytes(policy.placement.host_bytes)
        raise PolicyError(
            f"placement.host_bytes is {asked}, but ranks keep their layers on their devices: set it to 0, or leave "
            "tensor_parallel out"
        )
    kv = policy.kv
    if kv.place != "device":
        raise PolicyError(f"kv.place is {kv.place!r}, but ranks keep their pages on their devices: set it to 'device'")
    if kv.overflow == "evict":
        raise PolicyError(
            "kv.overflow is 'evict', which asks all heads, and each rank has only its own: set it to 'stop', "
            "'drop-oldest-turns' or 'window'"
        )
    if before is not None and kv.precision != before.kv.precision:
        raise PolicyError(
            f"kv.precision is {before.kv.precision!r} on every rank since this model was loaded: load it again with "
            f"policy.replace(kv={{'precision': {kv.precision!r}}})"
        )
