"""How well a language model foretells a text, its earlier tokens being read back from pages as a setting keeps them."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.prompt import Prompt
from autoglm_lab.errors import LabError
from autoglm_lab.memory.kv.eviction import Eviction
from autoglm_lab.memory.kv.observing_cache import ObservingCache
from autoglm_lab.workbench import Workbench

TEXT = ("training_args.py", "generation/configuration_utils.py")
"""Files of the installed transformers whose documentation strings are the text."""
TEXT_DIGEST = "51bae46950fee14c"
"""Of transformers 5.23.0."""
CONTEXT = 1024
CHUNK = 64
_ROWS = 256


def documentation() -> str:
    """The documentation strings of `TEXT`, in the order of the files.

    Raises:
        LabError: the installed transformers has not got a file.
    """
    folder = Path(transformers.__file__).parent
    missing = [name for name in TEXT if not (folder / name).is_file()]
    if missing:
        raise LabError(f"this transformers ({transformers.__version__}) has no {missing[0]}: install 5.23.0")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: list[str] = []
    for name in TEXT:
        tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found += [string for string in strings if string]
    return "\n\n".join(found)


def digest(text: str) -> str:
    """The first 16 digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def contexts(tokenizer: Any, text: str, length: int = CONTEXT) -> list[tuple[int, ...]]:
    """The text's tokens in pieces of ``length``; what is left at its end is not used.

    Raises:
        LabError: the text has fewer tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = [tuple(ids[at : at + length]) for at in range(0, len(ids) - length + 1, length)]
    if not found:
        raise LabError(f"the text has {len(ids):,} tokens for this tokenizer, and one context takes {length:,}")
    return found


@torch.no_grad()
def losses(
    workbench: Workbench,
    ids: Sequence[int],
    *,
    window: tuple[int, int] | None = None,
    eviction: Eviction | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Nats that each token after the first costs, ``[len(ids) - 1]``, read by the engine's own steps.

    No turn may be under way: these steps run in the caller's thread.

    Args:
        window: most tokens kept and first tokens that stay, where older ones are forgotten on the way.
        eviction: the same, where those are forgotten that got the least attention: of the tokens before each step,
            since the text to come is what is to be foretold.
        chunk: tokens of one step. All but those of the same step are read from the pages, and those of the same step
            too where the pages are not as exact as the model.
    """
    stepper, kept = workbench.engine.state.stepper, KvState(workbench.engine.state.pool)
    kept.window, kept.eviction = window, eviction
    step = chunk if eviction else len(ids)
    try:
        with _hidden_of(workbench.model) as hidden:
            for first in range(0, len(ids), step):
                part = Prompt(tuple(ids[: first + step]), None, ())
                if eviction:
                    stepper.make_room(kept, len(part.ids) - first)
                stepper.prefill(kept, part, first, chunk=chunk)
    finally:
        kept.clear()
    return _costs(workbench.model.get_output_embeddings(), torch.cat(hidden), ids)


@torch.no_grad()
def losses_after(workbench: Workbench, kept: KvState, ids: Sequence[int]) -> Tensor:
    """Nats that each token costs after the first of those that ``kept`` has not read, all read at once."""
    first = len(kept.ids)
    with _hidden_of(workbench.model) as hidden:
        workbench.engine.state.stepper.prefill(kept, Prompt(tuple(ids), None, ()), first)
    return _costs(workbench.model.get_output_embeddings(), torch.cat(hidden), ids[first:])


@contextlib.contextmanager
def _hidden_of(model: Any) -> Iterator[list[Tensor]]:
    """What the decoder gives in every step meanwhile, ``[tokens, width]`` each; not where it only looks."""
    hidden: list[Tensor] = []

    def note(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        if not isinstance(given.get("past_key_values"), ObservingCache):
            hidden.append(output.last_hidden_state[0])

    hook = _decoder(model).register_forward_hook(note, with_kwargs=True)
    try:
        yield hidden
    finally:
        hook.remove()


@torch.no_grad()
def stock_losses(model: Any, cache: Cache, ids: Sequence[int], *, chunk: int = CHUNK) -> Tensor:
    """The same from plain transformers with a cache of its own."""
    hidden: list[Tensor] = []
    given = torch.tensor([list(ids)], device=model.device)
    decoder = _decoder(model)
    for start in range(0, len(ids), chunk):
        part = given[:, start : start + chunk]
        seen = torch.ones((1, start + part.shape[1]), dtype=torch.long, device=model.device)
        output = decoder(input_ids=part, attention_mask=seen, past_key_values=cache, use_cache=True)
        hidden.append(output.last_hidden_state[0])
    return _costs(model.get_output_embeddings(), torch.cat(hidden), ids)


def perplexity(costs: Sequence[Tensor]) -> float:
    """The perplexity over all contexts' tokens."""
    return math.exp(float(torch.cat(list(costs)).double().mean()))


def change(costs: Sequence[Tensor], before: Sequence[Tensor]) -> tuple[float, tuple[float, float]]:
    """How much higher the perplexity is than ``before``, in %, and the 95 % interval of that.

    Both are of the same contexts, whose differences give the interval: 1.96 standard errors of their mean.
    """
    pairs = zip(costs, before, strict=True)
    apart = torch.stack([(one.double() - other.double()).mean() for one, other in pairs])
    mean = float(apart.mean())
    error = 1.96 * float(apart.std()) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
    return _percent(mean), (_percent(mean - error), _percent(mean + error))


def _percent(nats: float) -> float:
    return 100 * math.expm1(nats) if nats < 100 else math.inf


def _decoder(model: Any) -> torch.nn.Module:
    decoder: torch.nn.Module = model.get_decoder()
    return decoder


def _costs(head: Any, hidden: Tensor, ids: Sequence[int]) -> Tensor:
    """``hidden`` is ``[len(ids), width]``; the logits of a few rows at a time are all that is ever there."""
    targets = torch.tensor(ids[1:], device=hidden.device)
    rows = zip(hidden[:-1].split(_ROWS), targets.split(_ROWS), strict=True)
    return torch.cat([functional.cross_entropy(head(one).float(), other, reduction="none") for one, other in rows])
