"""One turn on the local engine: from messages to the answer, one step at a time."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Generator
from typing import Any

import torch

from autoglm_lab.engine.answer import AnswerReader
from autoglm_lab.engine.chooser import Chooser
from autoglm_lab.engine.conversation import Conversation
from autoglm_lab.engine.live import LiveSound
from autoglm_lab.engine.messages import AudioPart, ImagePart, Message, TextPart, media
from autoglm_lab.engine.prompt import Prompt, render
from autoglm_lab.engine.protocol import Answer, FinishReason, MemoryEvent, Timings, Turn, Usage
from autoglm_lab.engine.recovery import recovering
from autoglm_lab.engine.request_estimate import Estimate
from autoglm_lab.engine.state import EngineState
from autoglm_lab.engine.stop_strings import StopStrings
from autoglm_lab.errors import ContextLimitError, LabError, OutOfMemoryError
from autoglm_lab.memory.peak import PhasePeaks
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.policy import GenerationPolicy, KvPolicy

Steps = Generator[int, torch.Tensor, None]
"""A turn's steps: what `TurnRun.steps` gives."""


class TurnRun:
    """A turn under way. The engine's thread calls `steps`; other threads only set ``cancelled``.

    Args:
        messages: what is new in this turn.
        settings: how the answer is sampled.
        replace: the messages are the whole dialogue, in place of what the conversation has.
        keep: False: the conversation is forgotten when the turn has ended.
        force: try it also where the plan says that it cannot fit.
    """

    def __init__(
        self,
        state: EngineState,
        turn: Turn,
        conversation: Conversation,
        messages: tuple[Message, ...],
        settings: GenerationPolicy,
        *,
        replace: bool = False,
        keep: bool = True,
        force: bool = False,
    ) -> None:
        self.turn, self.conversation, self.messages, self.settings = turn, conversation, messages, settings
        self._keep, self._force = keep, force
        self._estimate: Estimate | None = None
        self._history: tuple[Message, ...] | None = None
        if replace:
            asked = _last_question(messages)
            self._history, self.messages = messages[:asked], messages[asked:]
        self.cancelled = False
        self.sound: LiveSound | None = None
        self.live: dict[str, Any] = {}
        self._state = state
        self._submitted = time.monotonic()
        self._first_token: float | None = None
        self._moves: list[Move] = []
        self.peaks = PhasePeaks()

    def start_clock(self) -> None:
        """Time to the first token counts from now: for a live turn, from the moment the question is closed."""
        self._submitted = time.monotonic()

    def steps(self) -> Steps:
        """Run the turn: it yields a token to be read and is sent the logits after it; one yield a step.

        The turn is finished, or failed, when this ends; an error of the step that reads its token is thrown in.
        """
        try:
            answer = yield from self._answer()
        except Exception as error:  # noqa: BLE001 - whoever waits for the turn gets it
            self._state.enter("idle")
            self._account({})
            self._leave()
            self.turn.fail(_without_frames(error))
        else:
            self._state.enter("idle")
            self._account({} if answer.finish_reason == "cancelled" else answer.peak_bytes)
            self._leave()
            self.turn.emit(answer)

    def withdraw(self) -> None:
        """Finish a turn that was cancelled before it began."""
        answer = self._finished("", "", "cancelled", None, 0, 0)
        if not self.conversation.busy:
            self._leave()
        self.turn.emit(answer)

    def _account(self, peaks: dict[str, int]) -> None:
        """Keep what was predicted beside the peaks that were measured; none where the turn was not gone through."""
        if self._state.admission is not None:
            self._state.admission.ended(self.conversation.name, self._estimate, peaks)

    def _leave(self) -> None:
        """The conversation is another turn's from now on, or nobody's."""
        self.conversation.busy = False
        if not self._keep and self.conversation.name in self._state.conversations:
            self._state.conversations.drop(self.conversation.name)

    def _answer(self) -> Generator[int, torch.Tensor, Answer]:
        state, conversation = self._state, self.conversation
        reuse = state.policy.kv.reuse
        if not reuse:
            conversation.kv.clear()
        self._wake_early()
        history, prompt, limit = self._fit()
        start = recovering(state, "prefill", conversation, lambda: conversation.kv.begin(prompt, share=reuse))
        if state.admission is not None:
            self._estimate = state.admission.check(conversation, prompt, start, limit, force=self._force)
        self._wake(prompt, start)
        state.enter("prefill", self.peaks)
        read = recovering(state, "prefill", conversation, lambda: self._prefill(prompt, start))
        conversation.reused_share = start / len(prompt.ids)
        if read is None:
            return self._finished("", "", "cancelled", prompt, start, 0)
        logits = read
        del read  # or it would stay until the answer is there
        eos = _eos(state) if self.settings.eos else ()
        chooser = Chooser(self.settings, prompt.ids, eos, state.model.device)
        reader, stops = AnswerReader(state.tokenizer, prompt.ids), StopStrings(self.settings.stop)
        count = 0
        reason: FinishReason = "length"
        while True:
            token = chooser.choose(logits)
            self._tell_moves()
            count += 1
            self._first_token = self._first_token or time.monotonic()
            if token in eos:
                reason = "stop"
                break
            for delta in stops.feed(reader.feed(token)):
                self.turn.emit(delta)
            if stops.found:
                reason = "stop"
                break
            if count >= limit:
                break
            if self.cancelled:
                reason = "cancelled"
                break
            logits = yield token
            state.tokens_per_second = count / (time.monotonic() - self._first_token)
        for delta in (*stops.feed(reader.finish()), *stops.finish()):
            self.turn.emit(delta)
        spoken = Message("assistant", (TextPart(stops.text),))
        conversation.messages = (*history, *self.messages, spoken)
        conversation.kv.publish()
        state.enter("idle")
        return self._finished(stops.text, reader.reasoning, "stop" if stops.found else reason, prompt, start, count)

    def _prefill(self, prompt: Prompt, start: int) -> torch.Tensor | None:
        """Read the prompt in chunks; commands are served between them. None: cancelled meanwhile."""
        state = self._state

        def between() -> bool:
            state.meanwhile()
            return not self.cancelled

        with state.growth("kernels of prefill"):
            return state.stepper.prefill(
                self.conversation.kv, prompt, start, chunk=state.policy.kv.chunk, between=between
            )

    def _fit(self) -> tuple[tuple[Message, ...], Prompt, int]:
        """The history that fits, the prompt, and how many tokens the answer may have.

        Raises:
            ContextLimitError: it does not fit, and the policy does not allow to drop turns or there is none left.
        """
        state, kv = self._state, self._state.policy.kv
        history, dropped = self.conversation.messages if self._history is None else self._history, 0
        while True:
            prompt = render(
                state.model,
                state.processor,
                (*history, *self.messages),
                thinking=self.settings.thinking,
                live=self.live,
            )
            allowed = state.kv_limit()
            slides = self.conversation.kv.forget_beyond(allowed, kv)
            limit = min((None if slides else allowed) or _NO_LIMIT, state.context_tokens or _NO_LIMIT)
            wanted = self.settings.max_new_tokens
            room = limit - len(prompt.ids)
            enough = wanted if kv.overflow == "refuse" else min(wanted, limit // 4)
            if room >= enough or (kv.overflow in ("stop", "window", "evict") and room > 0):
                break
            shorter = _without_oldest_turn(history) if kv.overflow == "drop-oldest-turns" else None
            if shorter is None:
                if room > 0 and kv.overflow == "drop-oldest-turns":
                    break
                raise ContextLimitError(_too_long(len(prompt.ids), wanted, limit, kv))
            history, dropped = shorter, dropped + 1
        if dropped:
            subject = f"{dropped} oldest turn(s) of '{self.conversation.name}'"
            self._tell(state.event("dropped", subject, why="KV limit"))
        return history, prompt, min(wanted, room)

    def _wake(self, prompt: Prompt, start: int) -> None:
        """Wake the modules that this prompt needs from token ``start`` on."""
        state = self._state
        needs = [name for name in state.residency if name not in ("vision", "audio")]
        encoded = state.stepper.encoder.missing(prompt, start)
        needs += ["vision"] * ("image" in encoded and "vision" in state.residency)
        needs += ["audio"] * ("audio" in encoded and "audio" in state.residency)
        why = f"a turn of '{self.conversation.name}'"
        state.in_use = frozenset(needs)
        state.enter("load", self.peaks)
        self._moves += recovering(state, "load", self.conversation, lambda: state.residency.ensure(needs, why))

    def _wake_early(self) -> None:
        """Let the encoders of this turn's own media come while those are decoded, resized and cut into patches.

        A medium whose output is kept from an earlier turn needs none. Where a wake cannot go on beside other work
        nothing is gained.
        """
        state = self._state
        knows = state.stepper.encoder.knows
        images = [image for image in media(self.messages, ImagePart) if not knows("image", image.digest)]
        sounds = [sound for sound in media(self.messages, AudioPart) if not knows("audio", sound.digest)]
        sounds = [sound for sound in sounds if sound.digest not in self.live]
        needs = ["vision"] * bool(images) + ["audio"] * bool(sounds)
        absent = [name for name in needs if name in state.residency and state.residency[name].at != "device"]
        if not absent or state.accelerator.kind == "cpu":
            return
        state.in_use = frozenset(absent)
        # Where there is no room for it now, `_wake` makes some.
        with contextlib.suppress(OutOfMemoryError):
            self._moves += state.residency.ensure(absent, f"a turn of '{self.conversation.name}'")

    def _tell_moves(self) -> None:
        """Add the moves that this turn began to its events; they have ended when the first token is there."""
        for move in self._moves:
            self._tell(move.result())
        self._moves = []

    def _tell(self, event: Any) -> None:
        self.turn.emit(MemoryEvent(event))

    def _finished(
        self, text: str, reasoning: str, reason: FinishReason, prompt: Prompt | None, cached: int, count: int
    ) -> Answer:
        now = time.monotonic()
        first = self._first_token
        usage = Usage(
            prompt_tokens=len(prompt.ids) if prompt else 0,
            cached_tokens=cached,
            completion_tokens=count,
            image_tokens=prompt.tokens_of("image") if prompt else 0,
            audio_tokens=prompt.tokens_of("audio") if prompt else 0,
        )
        timings = Timings(
            first_token=None if first is None else first - self._submitted,
            total=now - self._submitted,
            tokens_per_second=(count - 1) / (now - first) if first is not None and count > 1 else None,
        )
        peaks, work = dict(self.peaks.process), dict(self.peaks.work)
        kv_bytes = self.conversation.kv.nbytes
        return Answer(text, reasoning, reason, usage, timings, peaks, self.conversation.name, work, kv_bytes)


_NO_LIMIT = 1 << 60


def _without_frames(error: Exception) -> Exception:
    """The error without its frames, which would keep the failed step's tensors alive; a bug's frames stay as text."""
    if not isinstance(error, LabError):
        error.add_note("".join(traceback.format_exception(error)))
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def _last_question(messages: tuple[Message, ...]) -> int:
    """Where the last turn of a whole dialogue begins."""
    return max((index for index, message in enumerate(messages) if message.role == "user"), default=0)


def _without_oldest_turn(history: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """``history`` less its first user message and what answers it; the system prompt stays. None: nothing to drop."""
    users = [index for index, message in enumerate(history) if message.role == "user"]
    if not users:
        return None
    end = users[1] if len(users) > 1 else len(history)
    return history[: users[0]] + history[end:]


def _too_long(prompt: int, wanted: int, limit: int, kv: KvPolicy) -> str:
    source = "the model's context"
    if kv.max_tokens == limit:
        source = "kv.max_tokens"
    elif kv.max_bytes is not None and limit < (kv.max_tokens or _NO_LIMIT):
        source = "kv.max_bytes"
    advice = {
        "stop": "start a new conversation, shorten the prompt, or set kv.overflow to 'drop-oldest-turns'",
        "refuse": "lower generation.max_new_tokens, or set kv.overflow to 'stop' or 'drop-oldest-turns'",
        "window": "start a new conversation or shorten the prompt: positions go no further",
        "evict": "start a new conversation or shorten the prompt: positions go no further",
        "drop-oldest-turns": "there is no older turn left to drop: shorten the prompt",
    }[kv.overflow]
    raised = f" or raise kv.max_tokens above {prompt + wanted}" if source == "kv.max_tokens" else ""
    raised = " or raise kv.max_bytes" if source == "kv.max_bytes" else raised
    return (
        f"the prompt has {prompt:,} tokens and the answer may have {wanted:,}, but {source} allows {limit:,} together: "
        f"{advice}{raised}"
    )


def _eos(state: EngineState) -> tuple[int, ...]:
    ids = getattr(state.model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = state.tokenizer.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
