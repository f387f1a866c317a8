"""From generated tokens to text: the thought and the answer told apart, piece by piece, tags taken off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoglm_lab.engine.protocol import ReasoningDelta, TextDelta

# A character takes at most four bytes, hence four tokens: what is longer is no half character.
_LONGEST = 4
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class AnswerReader:
    """Reads one answer token by token.

    The public AutoGLM format is ``<think>…</think><answer>…</answer>``. Where a tokenizer has these tags as tokens they
    switch between thought and answer and are not shown; for other models everything is the answer.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: the prompt; a thought that its last ``<think>`` left open goes on in the answer.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        unknown = tokenizer.unk_token_id
        ids = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in _TAGS}
        self._tags = {token: tag for tag, token in ids.items() if token is not None and token != unknown}
        last = next((self._tags[token] for token in reversed(prompt_ids) if token in self._tags), "")
        self._thinking = last == "<think>"
        self._pending: list[int] = []
        self._shown = 0
        self._held = 0
        self.text = ""
        self.reasoning = ""

    def feed(self, token: int) -> list[TextDelta | ReasoningDelta]:
        """The pieces that ``token`` completes; often one, none inside a character of several tokens."""
        tag = self._tags.get(token)
        if tag is None:
            self._pending.append(token)
            return self._show(flush=False)
        deltas = self._show(flush=True)
        self._pending, self._shown = [], 0
        self._thinking = tag == "<think>"
        return deltas

    def finish(self) -> list[TextDelta | ReasoningDelta]:
        """What is left when generation has ended."""
        return self._show(flush=True)

    def _show(self, *, flush: bool) -> list[TextDelta | ReasoningDelta]:
        whole = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        self._held += 1
        if not flush and whole.endswith("\ufffd") and self._held < _LONGEST:
            return []
        self._held = 0
        piece = whole[self._shown :]
        self._shown = len(whole)
        if len(self._pending) > 64 and not flush:
            # A space or a half character may depend on the token before: keep a few as the context of the next decode.
            self._pending = self._pending[-8:]
            self._shown = len(self._tokenizer.decode(self._pending, skip_special_tokens=True))
        if not piece:
            return []
        if self._thinking:
            self.reasoning += piece
            return [ReasoningDelta(piece)]
        self.text += piece
        return [TextDelta(piece)]
