"""A model without weights in the precision that a policy asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.loading import Outline
from autoglm_lab.models.precision import convert, dtype_of, made_in, precisions_of
from autoglm_lab.models.skeleton import skeleton


def outline_in(shapes: Outline, precisions: Mapping[str, str]) -> Outline:
    """A model without weights, with its modules in ``precisions`` and no others.

    Raises:
        PolicyError: there is no such module or precision.
        LoadError: the model's layers cannot be kept in that precision.
    """
    wanted = {name: precision for name, precision in precisions.items() if precision != "model"}
    if precisions_of(shapes.model) == wanted:
        return shapes
    model = skeleton(shapes.model.config, made_in(shapes.model))
    convert(model, wanted)
    text = next((spec for spec in anatomy(model) if spec.name == "text"), None)
    return replace(shapes, model=model, dtype=dtype_of(model, text))
