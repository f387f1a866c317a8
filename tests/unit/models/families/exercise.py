"""What one family goes through: attached, asked in several ways, detached, and compared with the plain model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import autoglm_lab as lab
from autoglm_lab.engine.messages import read_messages
from tests.unit.models.families.family import Family

QUESTION = "a longer question of which the beginning has to be remembered until its very end"
_NEW = 6
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What was seen.

    Attributes:
        asked: the ids that each question led to with the workbench, by what was asked.
        plain: the same with ``model.generate``.
        changed: what of the model is not as it was before it was attached.
        row: of the table in docs/models.md.
    """

    asked: Mapping[str, list[int]]
    plain: Mapping[str, list[int]]
    changed: Sequence[str]
    modules: tuple[str, ...]
    row: str


def exercise(family: Family) -> Outcome:
    """Take a family through everything."""
    model, processor = family.build(), family.processor()
    question = _question(family, 1)
    first = _generate(model, processor, question)  # transformers leaves hooks of its own at the first use
    before = _snapshot(model)
    policy = lab.MemoryPolicy(generation={"max_new_tokens": _NEW, "eos": False})
    dialogues: dict[str, Messages] = {}
    asked: dict[str, list[int]] = {}
    wb = lab.attach(model, processor, policy=policy)
    try:
        modules = tuple(wb.modules)

        def ask(name: str, conversation: str, history: Messages, question: Messages) -> Messages:
            dialogues[name] = [*history, *question]
            answer = wb.engine.submit(question, conversation=conversation).result(60)
            asked[name] = list(wb.engine.state.conversations.get(conversation).kv.ids)
            return [*dialogues[name], {"role": "assistant", "content": answer.text}]

        history = ask("first turn", "main", [], question)
        for name in ("vision", "audio"):
            if name in wb.modules:
                wb.modules[name].park()
        wb.policy = policy.replace(kv={"chunk": 16})
        ask("in pieces", "other", [], _question(family, 2, 3))
        ask("second turn", "main", history, [{"role": "user", "content": "and now something else"}])
        row = _row(family, wb)
        wb.modules["text"].park()
    finally:
        detached = None if wb.closed else wb.detach()
    assert detached is model
    changed = list(_differences(before, _snapshot(model)))
    plain = {name: _generate(model, processor, messages) for name, messages in dialogues.items()}
    if plain["first turn"] != first:
        changed.append("its answer")
    return Outcome(asked, plain, changed, modules, row)


def _question(family: Family, *seeds: int) -> Messages:
    """A question with one image and sound a seed, as far as the family takes them."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": "look"}]
    for seed in seeds:
        parts += [{"type": kind, kind: _medium(kind, seed)} for kind in family.media]
        parts.append({"type": "text", "text": QUESTION[: 80 // len(seeds)]})
    return [{"role": "user", "content": parts}]


def _medium(kind: str, seed: int) -> Any:
    random = np.random.default_rng(seed)
    if kind == "image":
        return Image.fromarray(random.integers(0, 255, (56, 56, 3), dtype=np.uint8))
    return (random.normal(size=16_000) * 0.1).astype(np.float32)


def _generate(model: Any, processor: Any, messages: Messages) -> list[int]:
    """What was read in the end: the last token is chosen, not read."""
    rendered = [message.for_processor() for message in read_messages(messages)]
    with torch.no_grad():
        ids = model.generate(**processor.apply_chat_template(rendered), do_sample=False, max_new_tokens=_NEW)
    return ids[0, :-1].tolist()


def _row(family: Family, wb: lab.Workbench) -> str:
    state = wb.engine.state
    in_one = any(event.subject == "prompts" for event in wb.events)
    cells = (
        family.name,
        ", ".join(family.media) or "text",
        ", ".join(wb.modules),
        "pages" if state.pool is not None else "transformers' own",
        "in one piece" if in_one else "in pieces",
    )
    return f"| {' | '.join(cells)} |"


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a person could notice of a model, by name."""
    seen: dict[str, Any] = {"config": model.config.to_dict()}
    for path, module in model.named_modules():
        seen[f"{path}: attention"] = getattr(getattr(module, "config", None), "_attn_implementation", None)
        seen[f"{path}: state"] = {
            name: value
            for name, value in module.__dict__.items()
            if name == "training" or "forward" in name or "hook" in name or name == "rope_deltas"
        }
        seen[f"{path}: state"] = {name: _plain(value) for name, value in seen[f"{path}: state"].items()}
    for name, tensor in _tensors(model):
        seen[f"{name}: object"] = id(tensor)
        seen[f"{name}: values"] = tensor.detach().clone()
        own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        seen[f"{name}: layout"] = (tensor.device, tensor.dtype, tensor.stride(), tensor.requires_grad, own)
    return seen


def _plain(value: Any) -> Any:
    return len(value) if isinstance(value, Mapping) else value if isinstance(value, bool) else repr(value)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name in before.keys() | after.keys():
        one, other = before.get(name), after.get(name)
        same = torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
        if not same:
            yield name
