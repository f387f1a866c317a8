"""One forward: a chunk of one conversation's prompt, or a decode step of a batch of conversations.

A step either ends, and then its tokens are committed to the conversation's `KvState`, or it fails, and then the state
is as it was before.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from autoglm_lab.engine.decode_graphs import DecodeGraphs
from autoglm_lab.engine.encoder import Encoder, UnusedOutputsError
from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.lean_forward import LeanForward
from autoglm_lab.engine.pieces import reads_in_pieces
from autoglm_lab.engine.positions import Positions
from autoglm_lab.engine.prompt import Prompt
from autoglm_lab.engine.question import Question
from autoglm_lab.errors import ContextLimitError, ConversationError
from autoglm_lab.memory.kv.observing_cache import ObservingCache
from autoglm_lab.memory.kv.paged_attention import decoder_configs, paged
from autoglm_lab.memory.kv.paged_cache import PagedCache
from autoglm_lab.memory.kv.paged_sequence import PagedSequence
from autoglm_lab.models.row_merge import RowMerge
from autoglm_lab.schedule import prefill_chunks

if TYPE_CHECKING:
    from autoglm_lab.engine.parallel.ranks import Ranks

_NO_LIMIT = 1 << 60
_OF_TOKENS = {"input_ids", "position_ids", "attention_mask", "block_sequence_ids", "logits_to_keep"}
"""What a forward is given that reads no image and no sound."""


class Stepper:
    """Runs a model one step at a time.

    Args:
        encoder: runs the encoders apart from the decoder; None: one that keeps nothing.
        graphs: decodes through captured graphs where they are given and fit.
        ranks: other processes that compute every step with this one; None: there are none.
        told: called with a sentence where the model cannot do what the policy asks.
    """

    def __init__(
        self,
        model: Any,
        *,
        encoder: Encoder | None = None,
        graphs: DecodeGraphs | None = None,
        ranks: Ranks | None = None,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model, self.graphs, self._ranks = model, graphs, ranks
        self.encoder = Encoder(model) if encoder is None else encoder
        self._positions = Positions(model)
        self._lean = LeanForward(model) if graphs is None else graphs.lean
        self._configs = decoder_configs(model) if self._positions.stated else ()
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        self._cache_name = "cache_params" if "cache_params" in self._accepted else "past_key_values"
        self._told = told
        self._in_pieces: bool | None = None
        self._here = torch.empty(0, device=model.device)

    @torch.no_grad()
    def prefill(
        self,
        state: KvState,
        prompt: Prompt,
        start: int,
        *,
        chunk: int = _NO_LIMIT,
        between: Callable[[], bool] = lambda: True,
    ) -> Tensor | None:
        """Read ``prompt`` from token ``start`` on; what is before stands in ``state`` (see `KvState.begin`).

        Args:
            chunk: most tokens of one forward.
            between: asked between two chunks whether to go on.

        Returns:
            Logits ``[vocab]`` after the last token, float32; None where ``between`` said no: what was read stays.

        Raises:
            ContextLimitError: a piece that must be read at once does not fit the window.
        """
        start = min(start, len(state.ids))  # fewer are there where an attempt failed after some were forgotten
        try:
            try:
                return self._prefill(state, prompt, start, chunk, between)
            except UnusedOutputsError:  # the encoder knows now, and leaves them to the model
                state.keep(start)
                return self._prefill(state, prompt, min(start, len(state.ids)), chunk, between)
        except BaseException:
            state.keep(start)
            raise

    def _prefill(
        self, state: KvState, prompt: Prompt, start: int, chunk: int, between: Callable[[], bool]
    ) -> Tensor | None:
        end, device = len(prompt.ids), self._model.device
        self._prepare()
        places = self._positions.of(prompt)
        outputs = self.encoder.encode(prompt, start) if self.encoder.separate(prompt, start) else None
        whole = [] if outputs is not None else prompt.whole()
        if places is None or (end - start > chunk and not self._reads_in_pieces(state)):
            chunks = [(start, end)]
            state.delta = 0 if places is None else places.delta
        else:
            state.delta = places.delta
            chunks = prefill_chunks(start, end, state.chunk(chunk, end), prompt.blocks, whole)
        state.question = None
        if state.eviction is not None and places is not None:
            state.question = Question.of(prompt, places, state.eviction.observation)
        logits: Tensor | None = None
        for first, last in chunks:
            if first > start and not between():
                return None
            self.make_room(state, last - first)
            arguments: dict[str, Any] = {}
            if outputs is not None:
                arguments |= self.encoder.arguments(prompt, outputs, first, last)
            else:
                within = prompt.inputs_within(first, last)
                arguments |= {name: value.to(device) for name, value in within.items()}
            if places is not None and self._positions.stated:
                arguments["position_ids"] = places.ids[..., first:last].to(device)
            arguments |= _blocks_of(prompt, state, first, last, device)
            logits = self._one(state, prompt.ids[first:last], arguments, told=places is not None)
            state.blocks = None if prompt.blocks is None else [*prompt.blocks[:last]]
            state.runs = tuple(run for run in prompt.runs if run.start < last)
        state.publish()
        return logits

    def _prepare(self) -> None:
        """What the first steps take for a moment or for good: beside what encoders leave it would add to the peak."""
        if self._ranks is not None:  # all of them try at the same time, in their first step
            return
        self._lean.prepare()
        if self.graphs is not None:
            self.graphs.prepare()

    def _reads_in_pieces(self, state: KvState) -> bool:
        """Whether a prompt read in pieces gives what it gives in one; tried once, where layers keep a state."""
        if state.paged is not None:
            return True
        if self._in_pieces is None:
            self._in_pieces = reads_in_pieces(self._model, self._forward, told=self._positions.stated)
            if not self._in_pieces:
                self._told(
                    "a prompt is read in one piece: this model's recurrent layers do not go on from a part of it"
                )
        return self._in_pieces

    @torch.no_grad()
    def decode(self, states: Sequence[KvState], tokens: Sequence[int]) -> list[Tensor]:
        """Read one generated token of each conversation, in one forward where the model allows it.

        Returns:
            Logits ``[vocab]`` for each conversation's next token, float32.

        Raises:
            ConversationError: an earlier step failed in a cache that cannot be rolled back, which was dropped then.
        """
        if not all(state.ids for state in states):
            raise ConversationError(
                "a step failed, and this model's cache cannot be taken back to before it: ask again"
            )
        for state in states:
            self.make_room(state, 1)
        told = not any(state.position_state for state in states)
        together = _together(states) if told and self._positions.stated else None
        if together is not None and (self.graphs is not None or len(states) > 1):
            logits = self._batch(states, together, tokens)
        else:
            logits = [self._next(state, token) for state, token in zip(states, tokens, strict=True)]
        for state in states:
            if state.blocks is not None:
                state.blocks.append(-1)
        return logits

    @torch.no_grad()
    def make_room(self, state: KvState, new: int) -> None:
        """Let a conversation that is kept within a limit forget what it must, so that ``new`` more tokens fit.

        Raises:
            ContextLimitError: they do not fit beside those that stay, or nothing can be asked.
            OutOfMemoryError: there is no room for pages that other conversations hold too.
        """
        state.make_room(new)
        if state.over(new):
            state.evict(self._observed(state), new)

    def _observed(self, state: KvState) -> Tensor:
        """The attention that each slot's key gets from the last words, ``[layers, kv_heads, tokens]``."""
        if state.question is None or state.paged is None or state.eviction is None or not self._configs:
            raise ContextLimitError(
                "no token can be evicted: only the model itself can tell where this prompt's tokens stand, or computes "
                "its attention itself. Set kv.overflow to 'window', 'drop-oldest-turns' or 'stop'"
            )
        asked = state.question.then(state.ids, state.delta, state.eviction.observation)
        cache, device = ObservingCache(state.paged, len(asked.ids)), self._model.device
        try:
            self._forward(
                cache,
                input_ids=torch.tensor([asked.ids], device=device),
                position_ids=asked.positions.to(device),
                attention_mask=torch.ones((1, cache.longest), dtype=torch.long, device=device),
            )
        finally:
            cache.let_go()
        return cache.scores

    def _next(self, state: KvState, token: int) -> Tensor:
        told = not state.position_state
        arguments: dict[str, Any] = {}
        if told and self._positions.stated:
            arguments["position_ids"] = self._after([state])
        return self._one(state, (token,), arguments, told=told)

    def _one(self, state: KvState, ids: Sequence[int], arguments: dict[str, Any], *, told: bool) -> Tensor:
        """Read ``ids`` after what ``state`` holds; ``told``: the positions are among the arguments."""
        before, device = len(state.ids), self._model.device
        if not told:
            for index, module in enumerate(self._positions.kept):
                module.rope_deltas = state.position_state.get(index)
        cache: Cache
        if state.paged is not None:
            cache = PagedCache([state.paged], len(ids), gathers=not self._configs)
        else:
            cache = state.own = DynamicCache(config=self._model.config) if state.own is None else state.own
        # What was read is never masked; some models read the mask's length in place of positions, or beside a state.
        if before == 0 or (told and self._cache_name == "past_key_values"):
            seen = torch.ones((1, state.held + len(ids)), dtype=torch.long, device=device)
            arguments = {**arguments, "attention_mask": seen}
        try:
            logits = self._forward(cache, input_ids=torch.tensor([list(ids)], device=device), **arguments)[0]
        except BaseException:
            state.keep(before)
            raise
        if isinstance(cache, PagedCache):
            cache.commit()
        if not told:
            kept = [module.rope_deltas for module in self._positions.kept]
            state.position_state = {index: value for index, value in enumerate(kept) if value is not None}
        state.ids.extend(ids)
        return logits

    def _batch(
        self, states: Sequence[KvState], sequences: Sequence[PagedSequence], tokens: Sequence[int]
    ) -> list[Tensor]:
        positions = self._after(states)
        logits = None if self.graphs is None else self.graphs.step(sequences, tokens, positions)
        if logits is None:
            logits = self._eager(sequences, tokens, positions)
        for state, token in zip(states, tokens, strict=True):
            state.ids.append(token)
        return list(logits)

    def _eager(self, sequences: Sequence[PagedSequence], tokens: Sequence[int], positions: Tensor) -> Tensor:
        cache = PagedCache(sequences, 1, gathers=not self._configs)
        mask = None
        if not self._configs:
            implementation = self._model.config.get_text_config()._attn_implementation  # noqa: SLF001 - it has no public name
            mask = cache.mask(self._model.dtype, additive=implementation == "eager")
        try:
            logits = self._forward(
                cache,
                input_ids=torch.tensor(tokens, device=self._model.device)[:, None],
                attention_mask=mask,
                position_ids=positions.to(self._model.device),
            )
        except BaseException:
            cache.roll_back()
            raise
        cache.commit()
        return logits

    def _after(self, states: Sequence[KvState]) -> Tensor:
        return self._positions.after([len(state.ids) for state in states], [state.delta for state in states]).to(
            self._model.device
        )

    @torch.no_grad()
    def replay(self, sequences: Sequence[PagedSequence], new: int, arguments: dict[str, Any]) -> None:
        """Compute a step that another rank leads; its logits are that rank's to use.

        Args:
            sequences: with the pages for the ``new`` tokens that each of them reads.
            arguments: of the model.
        """
        self._forward(PagedCache(sequences, new, gathers=not self._configs), **arguments)

    def _forward(self, cache: Cache, **arguments: Any) -> Tensor:
        """Logits ``[batch, vocab]`` after the last token of each row, float32."""
        if "logits_to_keep" in self._accepted:
            arguments["logits_to_keep"] = 1
        ours = isinstance(cache, PagedCache) and self._configs
        over_pages = paged(self._configs, cache) if ours else contextlib.nullcontext()  # type: ignore[arg-type]
        together = contextlib.nullcontext() if self._ranks is None else self._ranks.step(cache, arguments, self._lean)
        merging = contextlib.nullcontext() if arguments.keys() <= _OF_TOKENS else RowMerge()
        # On several devices each part of the model makes its own the current one; afterwards it is this one again.
        with together, over_pages, self._lean.active(), merging, torch.cuda.device_of(self._here):
            given: dict[str, Any] = {self._cache_name: cache, "use_cache": True, **arguments}
            logits: Tensor = self._model(**given).logits
        self.encoder.check_used(arguments)
        return logits[:, -1].float().to(self._here.device)


def _together(states: Sequence[KvState]) -> list[PagedSequence] | None:
    """The pages of all, where every one is in pages of the same pool."""
    sequences = [state.paged for state in states if state.paged is not None]
    same = len(sequences) == len(states) and len({id(sequence.pool) for sequence in sequences}) == 1
    return sequences if same else None


def _blocks_of(prompt: Prompt, state: KvState, start: int, end: int, device: torch.device) -> dict[str, Tensor]:
    """What tells the model of bidirectional blocks: of all tokens up to ``end``, the cached ones too."""
    if prompt.blocks is None:
        return {}
    given = prompt.types or {"block_sequence_ids": prompt.blocks}
    if prompt.types and all(block == -1 for block in prompt.blocks[start:end]):
        return {}
    return {name: torch.tensor([state.without_forgotten(row[:end])], device=device) for name, row in given.items()}
