"""The engine in this process: one thread that alone runs forwards, parks and wakes, and changes the policy.

Everyone else submits and listens. Commands are taken between steps, so a switch takes effect in the middle of an
answer, and turns of several conversations go on side by side.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

from autoglm_lab.engine.commands import Commands
from autoglm_lab.engine.errands import Errands
from autoglm_lab.engine.live import LiveSound, with_sound
from autoglm_lab.engine.messages import AudioPart, ImagePart, Message, media, read_messages
from autoglm_lab.engine.occupation import Job, Occupation
from autoglm_lab.engine.policy_change import PolicyChange, check_modules
from autoglm_lab.engine.protocol import Capabilities, ConversationInfo, ModuleInfo, Turn, TurnListener
from autoglm_lab.engine.recovery import evict
from autoglm_lab.engine.state import EngineState
from autoglm_lab.engine.turn_queue import TurnQueue
from autoglm_lab.engine.turn_run import TurnRun
from autoglm_lab.errors import (
    ConversationError,
    EngineClosedError,
    MessageError,
    ModuleError,
    ModuleOffError,
)
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger, LedgerBook
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.policy import GenerationPolicy, MemoryPolicy

_TICK = 0.25


class LocalEngine:
    """Answers conversations with a model in this process. See `engine.protocol.Engine`.

    Args:
        state: the model and its memory.
        book: where the ledger is read.
        capabilities: what the model can do.
    """

    def __init__(self, state: EngineState, book: LedgerBook, capabilities: Capabilities) -> None:
        self._state, self._book, self._capabilities = state, book, capabilities
        self._commands = Commands()
        self._call, self._post = self._commands.call, self._commands.post
        self._turns = TurnQueue(state, self._after)
        self._occupation = Occupation(self._commands, self._turns)
        self._answers = 0
        self._ticked = 0.0
        self._gate = threading.Lock()
        self._listeners: tuple[TurnListener, ...] = ()
        self._errands = Errands(state)
        state.meanwhile = self._errands.serve_meanwhile
        self._change = PolicyChange(state, book)
        book.register(state)
        book.register(state.conversations)
        if state.pool is not None:
            book.register(state.pool)
        self._commands.serve(self)
        self._post(state.warm_up)

    # what is

    @property
    def policy(self) -> MemoryPolicy:
        return self._state.policy

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def phase(self) -> str:
        return self._state.phase

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed of the last turn that decoded."""
        return self._state.tokens_per_second

    @property
    def state(self) -> EngineState:
        """The model and its memory, for who builds on the engine; changed by the engine's thread alone."""
        return self._state

    @property
    def closed(self) -> bool:
        return self._commands.closed

    def ledger(self, card: int = 0) -> Ledger:
        """Args:
        card: which device, where the model lies on several.
        """
        return self._book.read(self._state.phase, self._state.policy.budget, card)

    def ledgers(self) -> tuple[Ledger, ...]:
        """One for each device that holds a part of the model, this process's first; see `ledger`."""
        others = () if self._state.ranks is None else self._state.ranks.ledgers()
        return (*(self.ledger(card) for card in range(self._book.cards)), *others)

    def modules(self) -> tuple[ModuleInfo, ...]:
        return tuple(module.info() for module in self._state.residency.values())

    def conversations(self) -> tuple[ConversationInfo, ...]:
        return self._state.conversations.infos()

    # what can be asked

    def submit(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        conversation: str = "main",
        live: bool = False,
        replace: bool = False,
        keep: bool = True,
        force: bool = False,
        **options: Any,
    ) -> Turn:
        """Append messages to a conversation and answer them. Returns at once.

        Args:
            messages: OpenAI-style, see `engine.messages`.
            conversation: its name; begun if new. A turn waits for the one before it.
            live: leave the question open for `Turn.feed` until `Turn.ask`.
            replace: the messages are the whole dialogue, as a client without state sends it; what the conversation
                had before is forgotten, and its keys and values are kept as far as both begin alike.
            keep: False: the conversation is forgotten when the turn has ended; its pages may stay as a prefix.
            force: try it also where the plan says that it cannot fit.
            options: generation settings for this turn alone, as in ``policy.generation``.

        Raises:
            MessageError, MediaError: the messages cannot be read.
            ModuleOffError: they need a module that the policy keeps off.
            PolicyError: an option does not exist or cannot be.

        The turn fails with `AdmissionError`, untried, where the plan says that it cannot fit.
        """
        if self._state.processor is None:
            raise MessageError("this model came without a tokenizer: attach one with it, or load a folder that has one")
        read = read_messages(messages) if messages or not live else ()
        settings = self._settings(options)
        self._check_media(read, live)
        feed, ask = (self._feed, self._ask) if live else (None, None)
        turn = Turn(conversation, cancel=self._cancel, feed=feed, ask=ask)
        self._post(lambda: self._begin(turn, read, settings, live, replace, keep, force))
        for listener in self._listeners:
            listener(turn, read)
        return turn

    def price(self, prompt_tokens: int, new_tokens: int, *, conversations: int = 1) -> tuple[int, int] | None:
        """Bytes that one more request adds: what stays until it ends, and what comes and goes; see `Admission.price`.

        None where that is not known yet: the first question begins to find out.
        """
        admission = self._state.admission
        return None if admission is None else admission.price(prompt_tokens, new_tokens, conversations=conversations)

    def on_turn(self, listener: TurnListener) -> None:
        """Call ``listener`` with every turn submitted from now on, in the thread that submits it: it must not wait."""
        with self._gate:
            self._listeners = (*self._listeners, listener)

    def off_turn(self, listener: TurnListener) -> None:
        with self._gate:
            self._listeners = tuple(known for known in self._listeners if known != listener)

    def set_policy(self, policy: MemoryPolicy) -> None:
        """Obey another policy, at once; KV limits from the next turn of a conversation on.

        A budget below what is held frees what the policy allows: keys and values of idle conversations, modules on
        demand, cached memory.

        Raises:
            PolicyError: it names a module that this model does not have, or a budget that does not fit even so; the
                policy stays as it was.
            ModuleError: a module could not be moved; the policy stays as it was.
        """
        check_modules(policy, self._state.residency)
        self._call(lambda: self._change.apply(policy))

    def park(self, module: str, place: Literal["auto", "host", "disk"] = "auto") -> Move:
        """Move a module off the device. A request that needs it wakes it, unless the policy keeps it off.

        Beside a GPU this returns at once, also while another turn decodes. What goes wrong later is raised by the
        move's `result`, and told as an event.
        """
        self._known(module)
        residency = self._state.residency[module]
        residency.target(place)
        if self._state.accelerator.kind == "cpu":
            return self._call(lambda: residency.park(place, why="asked"))
        move = self._errands.ask(module, place)
        self._post(self._errands.serve)
        return move

    def wake(self, module: str) -> Move:
        """Move a module onto the device. What the device does from now on waits for it; nobody else needs to."""
        self._known(module)
        return self._call(lambda: self._state.residency[module].wake(why="asked"))

    def reclaim(self) -> Event:
        """Give unused memory back to the system. The event's bytes are what was really given back."""
        return self._call(lambda: self._state.reclaim("asked"))

    def drop(self, conversation: str) -> None:
        """Forget a conversation. Its keys and values are freed, or kept as a prefix while ``kv.prefix_bytes`` allows.

        Raises:
            ConversationError: there is none of this name, or a turn of it is under way.
        """

        def run() -> None:
            conversations = self._state.conversations
            if conversation not in conversations:
                names = ", ".join(info.name for info in conversations.infos()) or "none"
                raise ConversationError(f"there is no conversation '{conversation}'; there are: {names}")
            if conversations.get(conversation).busy:
                raise ConversationError(f"conversation '{conversation}' has a turn under way: stop it first")
            self._state.event("evicted", f"conversation '{conversation}'", nbytes=conversations.drop(conversation))

        self._call(run)

    def occupy(self, job: Job) -> Future[Any]:
        """Let ``job`` have the model, on the engine's thread, once no turn is under way; turns wait until it is over.

        Args:
            job: given a function to call between its steps, which does what was asked of the engine meanwhile and
                answers False when the engine is being closed.

        Raises:
            TrainingError: another job has the model.
        """
        return self._call(lambda: self._occupation.ask(job))

    def stop(self) -> None:
        """Cancel every turn, waiting ones too. Returns at once."""
        self._post(self._turns.cancel)

    def close(self) -> None:
        """Cancel what runs, end the thread, and free every module. The engine answers nothing afterwards."""
        if not self._commands.close():
            return
        self._errands.close()
        if self._state.admission is not None:
            self._state.admission.close()
        _close(self._state, self._book)

    def detach(self) -> None:
        """Cancel what runs and give every module's weights back to the model, on the device; then as `close`.

        Raises:
            ModuleError, OutOfMemoryError: a module could not be given back; the engine goes on.
        """

        def run() -> None:
            self.finish()
            self._state.residency.release()

        self._call(run)
        self.close()

    # what only the engine's thread does

    def work(self) -> None:
        """One round of the turns under way, and what is due."""
        self._errands.mark()
        self._occupation.begin()
        self._turns.round()
        now = time.monotonic()
        if now - self._ticked >= _TICK:
            self._ticked = now
            self._state.residency.tick(time.time())

    @property
    def has_work(self) -> bool:
        return self._turns.any or self._occupation.any

    def finish(self) -> None:
        """Cancel every turn and let it end, so that nobody waits for ever."""
        self._occupation.refuse(EngineClosedError("this workbench was closed before the training began"))
        while self.has_work:
            self._turns.cancel()
            self.work()

    def _begin(
        self,
        turn: Turn,
        messages: tuple[Message, ...],
        settings: GenerationPolicy,
        live: bool,
        replace: bool,
        keep: bool,
        force: bool,
    ) -> None:
        conversation = self._state.conversations.get(turn.conversation)
        run = TurnRun(self._state, turn, conversation, messages, settings, replace=replace, keep=keep, force=force)
        turn.run = run
        run.cancelled = turn.cancelled
        if live and not run.cancelled:
            run.sound = LiveSound(self._state.model)
        else:
            self._turns.add(run)

    def _after(self) -> None:
        state = self._state
        self._answers += 1
        self._change.settle()
        for conversation in state.conversations.idle_by_age()[: -state.policy.kv.max_conversations]:
            evict(state, conversation, f"more than kv.max_conversations = {state.policy.kv.max_conversations}")
        why = state.reclaimer.due(self._answers, self.ledger(), state.policy.reclaim)
        if why and not self.has_work:
            self._answers = 0
            state.reclaim(why)

    def _feed(self, turn: Turn, pcm: Any) -> None:
        def run() -> None:
            sound = turn.run.sound
            if sound is None:
                raise ConversationError("the question is closed: it takes no more sound")
            self._state.residency.ensure(["audio"], "live sound")
            sound.feed(pcm)

        self._call(run)

    def _ask(self, turn: Turn, text: str | None) -> None:
        def run() -> None:
            job = turn.run
            if job.sound is None:
                raise ConversationError("this turn was already asked")
            self._state.residency.ensure(["audio"], "live sound")
            part, features = job.sound.close()
            job.sound, job.live = None, {part.digest: features}
            job.messages = with_sound(job.messages, part, text)
            job.start_clock()
            self._turns.add(job)

        self._call(run)

    def _cancel(self, turn: Turn) -> None:
        run = turn.run
        if run is None:
            return
        run.cancelled = True
        if run.sound is not None:
            run.sound = None
            run.withdraw()

    # checks in the caller's thread

    def _settings(self, options: dict[str, Any]) -> GenerationPolicy:
        given = {name: value for name, value in options.items() if value is not None}
        return self._state.policy.replace(generation=given).generation

    def _check_media(self, messages: Sequence[Message], live: bool) -> None:
        needs: list[tuple[str, str]] = []
        needs += [("vision", "an image in the message")] * bool(media(messages, ImagePart))
        needs += [("audio", "a sound in the message")] * bool(live or media(messages, AudioPart))
        for module, why in needs:
            if module not in self._state.residency:
                takes = ", ".join(self._capabilities.modalities)
                raise MessageError(f"this model has no module '{module}', needed for {why}; it takes {takes}")
            if self._state.policy.module(module).residency == "off":
                raise ModuleOffError(module, why)
        if live and not hasattr(self._state.model, "encode_audio_chunk"):
            raise MessageError("this model cannot encode sound while it comes in: send it with wb.chat(..., audio=…)")

    def _known(self, module: str) -> None:
        if module not in self._state.residency:
            known = ", ".join(self._state.residency)
            raise ModuleError(f"this model has no module '{module}'; its modules are {known}")


def _close(state: EngineState, book: LedgerBook) -> None:
    for sampler in state.samplers:
        sampler.stop()
    for conversation in state.conversations:
        conversation.kv.clear()
    book.unregister(state.conversations)
    book.unregister(state)
    if state.stepper.graphs is not None:
        state.stepper.graphs.clear()
    state.features.clear()
    if state.pool is not None:
        book.unregister(state.pool)
        state.pool.close()
    state.residency.close()
    if state.ranks is not None:
        state.ranks.close()
    state.set_budget(None)
