"""How a dialogue becomes text and text becomes pieces: markers, the chat template, and the guard that keeps text data.

A rendered prompt is a string in which every marker was written by the template. Whatever came from a message is
guarded first (`guard`), so a marker that a person typed is never one here. Nothing in this file imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PAD = "<|pad|>"
END = "<|endoftext|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
IMAGE = "<|image|>"
BEGIN_IMAGE = "<|begin_of_image|>"
END_IMAGE = "<|end_of_image|>"
AUDIO = "<|audio|>"
BEGIN_AUDIO = "<|begin_of_audio|>"
END_AUDIO = "<|end_of_audio|>"
BEGIN_THINK, END_THINK = "<think>", "</think>"
BEGIN_ANSWER, END_ANSWER = "<answer>", "</answer>"

ROLE_MARKERS: tuple[str, ...] = (SYSTEM, USER, ASSISTANT)
ANSWER_TAGS: tuple[str, ...] = (BEGIN_THINK, END_THINK, BEGIN_ANSWER, END_ANSWER)
SPECIAL_TOKENS: tuple[str, ...] = (
    PAD,
    END,
    SYSTEM,
    USER,
    ASSISTANT,
    BEGIN_IMAGE,
    IMAGE,
    END_IMAGE,
    BEGIN_AUDIO,
    AUDIO,
    END_AUDIO,
    *ANSWER_TAGS,
)
"""Every marker, in the order of its id: the first entries of the vocabulary."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message.role not in ('system', 'user', 'assistant') -%}
    {{- raise_exception("unknown role '" ~ message.role ~ "': use system, user or assistant") -}}
  {%- endif -%}
  {{- '<|' ~ message.role ~ '|>' -}}
  {%- if message.role == 'assistant' -%}
    {%- set spoken = namespace(text='') -%}
    {%- if message.content is string -%}
      {%- set spoken.text = message.content -%}
    {%- else -%}
      {%- for part in message.content or [] if part.type == 'text' -%}
        {%- set spoken.text = spoken.text ~ part.text -%}
      {%- endfor -%}
    {%- endif -%}
    {%- set answer = spoken.text.split('</think>')[-1].split('<answer>')[-1].split('</answer>')[0] -%}
    {{- '<think></think>' -}}
    {%- generation -%}{{- '<answer>' ~ answer ~ '</answer><|endoftext|>' -}}{%- endgeneration -%}
  {%- elif message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'text' -%}
        {{- part.text -}}
      {%- elif part.type == 'image' -%}
        {{- '<|begin_of_image|><|image|><|end_of_image|>' -}}
      {%- elif part.type == 'audio' -%}
        {{- '<|begin_of_audio|><|audio|><|end_of_audio|>' -}}
      {%- else -%}
        {{- raise_exception("unknown content part '" ~ part.type ~ "': use text, image or audio") -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
  {%- if not (enable_thinking is defined and enable_thinking) -%}{{- '<think></think>' -}}{%- endif -%}
{%- endif -%}
"""
"""Concatenative: the rendering of messages[:k] is a prefix of the rendering of messages, thoughts always dropped."""

# A Unicode noncharacter, so that it is not expected in anybody's text; if it is there, it is doubled and survives.
_GUARD = "\ufdd0"
_GUARDS = re.compile(f"({_GUARD}{_GUARD}?)")
_MARKER = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered prompt: one marker, or text that is tokenised on its own and never as a marker.

    `start` and `stop` are the characters of the prompt that it came from.
    """

    text: str
    is_marker: bool
    start: int
    stop: int


def guard(text: str) -> str:
    """Make `text` data: after this no marker can be found in it. `pieces` takes the guard out again."""
    doubled = text.replace(_GUARD, _GUARD * 2)
    return _MARKER.sub(lambda found: found[0][0] + _GUARD + found[0][1:], doubled)


def unguard(text: str) -> str:
    """The text that `guard` was given."""
    return "".join(piece.text for piece in _texts(text, 0, len(text)))


def pieces(prompt: str) -> list[Piece]:
    """Split a rendered prompt into markers and texts; guarded text comes out as it was before `guard`."""
    found: list[Piece] = []
    start = 0
    for marker in _MARKER.finditer(prompt):
        found += _texts(prompt, start, marker.start())
        found.append(Piece(marker[0], True, *marker.span()))
        start = marker.end()
    return found + _texts(prompt, start, len(prompt))


def blocks(prompt_pieces: list[Piece]) -> list[int]:
    """The bidirectional block of each piece: the number of its user turn from 0, or -1 outside user turns."""
    turn, inside, found = -1, False, []
    for piece in prompt_pieces:
        if piece.is_marker and piece.text == USER:
            turn, inside = turn + 1, True
        elif piece.is_marker and piece.text in (SYSTEM, ASSISTANT, END):
            inside = False
        found.append(turn if inside else -1)
    return found


def split_answer(text: str) -> tuple[str, str]:
    """Take an answer apart: `<think>…</think><answer>…</answer>` -> (thought, answer); tags may be missing or cut off.

    Example:
        >>> split_answer('<think>top left</think><answer>finish(message="ok")</answer>')
        ('top left', 'finish(message="ok")')
    """
    text = text.removesuffix(END)
    thought, closed, rest = text.rpartition(END_THINK)
    if not closed and text.startswith(BEGIN_THINK):
        thought, rest = text, ""
    answer = rest.split(BEGIN_ANSWER)[-1].split(END_ANSWER)[0]
    return thought.removeprefix(BEGIN_THINK), answer


def _texts(prompt: str, start: int, stop: int) -> list[Piece]:
    """The texts between single guards, so that no tokeniser sees a guarded marker whole; a doubled guard is one."""
    found = [("", start)]
    at = start
    for part in _GUARDS.split(prompt[start:stop]):
        at += len(part)
        if part == _GUARD:
            found.append(("", at))
        else:
            text, begin = found[-1]
            found[-1] = (text + (_GUARD if part == _GUARD * 2 else part), begin)
    return [Piece(text, False, begin, begin + len(text)) for text, begin in found if text]
