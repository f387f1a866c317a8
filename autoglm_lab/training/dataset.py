"""Dialogues to learn from, as JSON lines, and what is wrong with some of them.

A line is ``{"messages": […]}`` in OpenAI's chat format, images and sounds as paths beside the file or as data URIs,
the answer that is to be learnt last. An answer may have a thought: ``<think>…</think><answer>…</answer>``.
``"keep": true`` beside the messages says that the model answers this already, and that it is to go on doing so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_lab.engine.messages import Limits, Message, read_messages
from autoglm_lab.errors import DatasetError, LabError

_ACTION = re.compile(r"\s*(do|finish)\s*\(")
_CALL = re.compile(r'(do|finish)\((\w+=("(?:[^"\\]|\\.)*"|\[-?\d+,\s*-?\d+\]|[\w.\-]+)(,\s*|(?=\))))*\)', re.DOTALL)
_POINT = re.compile(r"\[(-?\d+),\s*(-?\d+)\]")
_MEDIA = ("image", "audio")


@dataclass(frozen=True)
class Problem:
    """A line that cannot be learnt from, counted from 1, and why."""

    line: int
    why: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.why}"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Dialogues that can be learnt from, and the lines that cannot.

    Attributes:
        name: the file, or ``dialogues``.
        lines: number of each dialogue's line, from 1.
        raw: messages as they stood there, paths of media made absolute. Media are read again when they are needed.
        problems: of the lines that were left out.
        kept: of each dialogue, whether its line says ``"keep": true``; empty: of none.
    """

    name: str
    lines: tuple[int, ...]
    raw: tuple[tuple[dict[str, Any], ...], ...]
    problems: tuple[Problem, ...] = ()
    kept: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.raw)

    def __iter__(self) -> Iterator[tuple[Message, ...]]:
        """The dialogues with their media read."""
        return (read_messages(messages) for messages in self.raw)

    def __repr__(self) -> str:
        kept = f", {sum(self.kept)} of them to be kept" if any(self.kept) else ""
        left = f", {len(self.problems)} line(s) left out" if self.problems else ""
        return "\n".join(
            [f"{self.name}: {len(self)} dialogue(s){kept}{left}", *(f"  {one}" for one in self.problems[:10])]
        )


def read_dataset(
    source: str | Path | Iterable[Mapping[str, Any]], *, strict: bool = False, limits: Limits | None = None
) -> Dataset:
    """Read and check dialogues.

    Args:
        source: a JSONL file, or the lines' objects.
        strict: a bad line is an error; else it is left out and reported.
        limits: of the images and sounds.

    Raises:
        DatasetError: there is no such file, ``strict`` and a bad line (the message names it), or not one good line.
    """
    given: Iterable[tuple[int, Any]]
    if isinstance(source, str | Path):
        path = Path(source)
        name, folder = path.name, path.resolve().parent
        if not path.is_file():
            raise DatasetError(f"there is no file '{path}': give JSON lines, one object with 'messages' a line")
        text = path.read_text(encoding="utf-8")
        given = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
    else:
        name, folder = "dialogues", Path.cwd()
        given = enumerate(source, 1)
    lines, raw, kept, problems = [], [], [], []
    for number, line in given:
        try:
            messages, keep = _checked(line, folder, limits)
            raw.append(messages)
            kept.append(keep)
            lines.append(number)
        except (LabError, ValueError) as error:
            problem = Problem(number, str(error))
            if strict:
                raise DatasetError(f"{name}, {problem}") from None
            problems.append(problem)
    if not raw:
        first = f"; {problems[0]}" if problems else ""
        raise DatasetError(f"{name} has no dialogue to learn from{first}")
    return Dataset(name, tuple(lines), tuple(raw), tuple(problems), tuple(kept) if any(kept) else ())


def _checked(line: Any, folder: Path, limits: Limits | None) -> tuple[tuple[dict[str, Any], ...], bool]:
    if isinstance(line, str):
        try:
            line = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(line, Mapping) or not isinstance(line.get("messages"), Sequence):
        raise ValueError("it has no list 'messages'")
    keep = line.get("keep", False)
    if not isinstance(keep, bool):
        raise ValueError(f"'keep' is true or false, not {keep!r}")
    raw = tuple(_beside(message, folder) for message in line["messages"])
    messages = read_messages(raw, limits)
    if messages[-1].role != "assistant" or not messages[-1].text.strip():
        raise ValueError("the last message must be the assistant's, with the text that is to be learnt")
    if all(message.role != "user" for message in messages):
        raise ValueError("there is no message of the user")
    for message in messages:
        if message.role == "assistant":
            check_action(message.text)
    return raw, keep


def _beside(message: Any, folder: Path) -> dict[str, Any]:
    """The message with paths of media as seen from the file's folder."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is an object with 'role' and 'content', not {type(message).__name__}")
    content = message.get("content")
    if isinstance(content, str) or not isinstance(content, Sequence):
        return dict(message)
    return {**message, "content": [_part_beside(part, folder) for part in content]}


def _part_beside(part: Any, folder: Path) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    source = part.get(kind) if kind in _MEDIA else None
    if isinstance(source, str) and not source.startswith("data:"):
        return {**part, kind: str(folder / source)}
    return part


def check_action(answer: str) -> None:
    """Raise `ValueError` where an answer begins as an action of the phone agent and is none.

    The format: ``do(action="Tap", element=[x,y])`` with x and y from 0 to 999, and ``finish(message="…")``.
    """
    spoken = answer.rpartition("</think>")[2]
    spoken = spoken.partition("<answer>")[2] or spoken
    spoken = spoken.partition("</answer>")[0].strip()
    if not _ACTION.match(spoken):
        return
    if not _CALL.fullmatch(spoken):
        raise ValueError(
            f'{spoken[:80]!r} is not an action: write do(action="Tap", element=[x,y]) or finish(message="…")'
        )
    if spoken.startswith("do(") and "action=" not in spoken:
        raise ValueError(f"{spoken[:80]!r} names no action: write do(action=…)")
    unquoted = re.sub(r'"(?:[^"\\]|\\.)*"', '""', spoken)
    for x, y in _POINT.findall(unquoted):
        if not (0 <= int(x) <= 999 and 0 <= int(y) <= 999):
            raise ValueError(f"the point [{x},{y}] is outside the screen: coordinates go from 0 to 999")
