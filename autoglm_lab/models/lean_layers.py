"""Which layers of a decoder can be computed in less memory, whoever does it or plans for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_PLAIN = (nn.Linear, nn.Dropout, nn.Identity)


def decoder_of(model: Any) -> nn.Module:
    """The part that reads tokens; the model itself where transformers tells none apart."""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError, TypeError):
        return model  # type: ignore[no-any-return]
    return decoder if isinstance(decoder, nn.Module) else model


def feed_forwards(model: Any) -> list[nn.Module]:
    """The decoder's layers that look at each token by itself."""
    return [module for module in decoder_of(model).modules() if _is_feed_forward(module)]


def rms_norms(model: Any) -> list[nn.Module]:
    """The decoder's root-mean-square norms, by name: some families compute something else under it."""
    return [module for module in decoder_of(model).modules() if type(module).__name__.endswith("RMSNorm")]


def norm_of(module: nn.Module) -> tuple[Tensor, float]:
    """The weight and the epsilon of a norm."""
    weight: Any = module.weight
    return weight, float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))


def _is_feed_forward(module: nn.Module) -> bool:
    """A module named so, of linear layers and activations without weights, as wide at the end as at the beginning."""
    if not type(module).__name__.lower().endswith(("mlp", "feedforward")):
        return False
    leaves = [child for child in module.modules() if child is not module]
    linear = [child for child in leaves if isinstance(child, nn.Linear)]
    others = [child for child in leaves if not isinstance(child, _PLAIN)]
    return bool(linear) and not any(True for child in others for _ in child.parameters())
