"""The engine behind an endpoint: a server of ours with every switch, any other one as far as it tells and takes."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from autoglm_lab.engine.messages import AudioPart, ImagePart, Message, media, read_messages
from autoglm_lab.engine.policy_difference import difference
from autoglm_lab.engine.protocol import Capabilities, ConversationInfo, ModuleInfo, Turn, TurnListener
from autoglm_lab.engine.remote.conversations import RemoteConversations
from autoglm_lab.engine.remote.history import WireMessage, wire_message
from autoglm_lab.engine.remote.link import AdminOnlyError, Link
from autoglm_lab.engine.remote.loop import Loop
from autoglm_lab.engine.remote.memory import Recent, ServerMemory
from autoglm_lab.engine.remote.peer import Peer
from autoglm_lab.engine.service_load import ServiceLoad
from autoglm_lab.errors import (
    EngineClosedError,
    MessageError,
    ModuleError,
    PolicyError,
)
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.policy import MemoryPolicy

RETRIES: Final = 2
"""How often a question that was not taken is asked again."""
_TURN_PARTS: Final = frozenset({"generation", "history"})


class RemoteEngine:
    """Answers conversations through an endpoint. See `engine.protocol.Engine`.

    The endpoint keeps no conversation: the history is kept here and sent with every turn. A server of ours is told the
    conversation's name too, so that its lists show it.

    Args:
        link: the endpoint.
        peer: what is behind it.
        timeout: seconds without a word after which an answer counts as broken off.
        record: is told of events of this side.
    """

    def __init__(self, link: Link, peer: Peer, *, timeout: float, record: Callable[[Event], None]) -> None:
        self._link, self._peer, self._timeout, self._record = link, peer, timeout, record
        self._policy = MemoryPolicy()
        self._recent = Recent()
        self._memory = ServerMemory(link, self._recent)
        self._lock = threading.Lock()
        self._listeners: tuple[TurnListener, ...] = ()
        self._chat: Any = None
        self._named = True
        self._warned: set[str] = set()
        self._latest_phase = "idle"
        self._closed = False
        self._loop = Loop()
        self._talks = RemoteConversations(link.host, self._loop, _weakly(self), self._recent.forget)
        weakref.finalize(self, self._loop.close)

    # what is

    @property
    def capabilities(self) -> Capabilities:
        return self._peer.capabilities

    @property
    def ours(self) -> bool:
        """Whether a server of this package is behind the endpoint."""
        return self._peer.dialect.ours

    @property
    def policy(self) -> MemoryPolicy:
        """The server's, where it is ours; else what this side asks with."""
        self._check_open()
        return self._memory.policy() if self.ours else self._policy

    @property
    def phase(self) -> str:
        reading = {job.phase for job in self._talks.running.values()} - {"idle"}
        if reading:
            return "decode" if "decode" in reading else "prefill"
        return self._latest_phase

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed of the last answer, as seen from here."""
        return self._talks.rate

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def load(self) -> ServiceLoad | None:
        """How busy the server is; None: it does not tell, or is ours, whose ledger tells more."""
        if self.ours:
            return None
        self._check_open()
        return self._recent.get("load", lambda: self._peer.load(self._link))

    @property
    def pages(self) -> tuple[PageFormat | None, int]:
        """How keys and values lie in the pages of a server of ours, and the bytes of one; None and 0: not told."""
        self._check_open()
        return self._memory.pages() if self.ours else (None, 0)

    def ledger(self) -> Ledger:
        """Who owns which bytes. Of a server that is not ours nobody knows: it has no total, and rows without bytes."""
        self._check_open()
        if self.ours:
            ledger = self._memory.ledger()
            self.seen(ledger)
            return ledger
        name, load = self._peer.dialect.name, self.load
        rows = () if load is None else (Row("KV", "kv", "device", None, str(load)),)
        self._latest_phase = "decode" if load is not None and load.running else "idle"
        note = f"{name} does not tell who owns which bytes"
        return Ledger(f"{name} at {self._link.host}", None, None, rows, time.time(), self.phase, None, (note,))

    def ledgers(self) -> tuple[Ledger, ...]:
        return (self.ledger(),)

    def seen(self, ledger: Ledger) -> None:
        """Take note of a ledger that the server sent."""
        self._latest_phase = ledger.phase

    def modules(self) -> tuple[ModuleInfo, ...]:
        self._check_open()
        return self._memory.modules() if self.ours else ()

    def conversations(self) -> tuple[ConversationInfo, ...]:
        """Those begun here; of a server of ours all that it keeps."""
        self._check_open()
        if self.ours:
            return self._memory.conversations()
        return self._talks.infos()

    # what can be asked

    def submit(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        conversation: str = "main",
        live: bool = False,
        replace: bool = False,
        force: bool = False,
        **options: Any,
    ) -> Turn:
        """Append messages to a conversation and answer them. Returns at once. See `LocalEngine.submit`.

        Args:
            live: leave the question open for `Turn.feed` until `Turn.ask`. Only a server of ours listens. Later turns
                of this conversation wait for it.
            force: try it also where the plan of a server of ours says that it cannot fit. It asks for its admin key.

        Raises:
            MessageError, MediaError: the messages cannot be read, or the model does not take what is in them.
            PolicyError: an option does not exist or cannot be.
        """
        self._check_open()
        if live and not self.ours:
            name = self._peer.dialect.name
            raise MessageError(f"{name} takes no live sound: send it whole with wb.chat(..., audio=…)")
        read = read_messages(messages) if messages or not live else ()
        self._check_media(read, live=live)
        request = self._request(options, conversation, force=force)
        feed, ask = (_feed, _close_question) if live else (None, None)
        turn = Turn(conversation, cancel=self._cancel, feed=feed, ask=ask)
        turn.run = self._job(turn, read, live=live)
        kept = "resend" if replace else self.policy.history.media
        self._talks.begin(turn.run, kept, request, replace=replace)
        for listener in self._listeners:
            listener(turn, read)
        return turn

    def on_turn(self, listener: TurnListener) -> None:
        """Call ``listener`` with every turn submitted from now on, in the thread that submits it: it must not wait."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def off_turn(self, listener: TurnListener) -> None:
        with self._lock:
            self._listeners = tuple(known for known in self._listeners if known != listener)

    def set_policy(self, policy: MemoryPolicy) -> None:
        """Ask with another policy, and let a server of ours obey it.

        Raises:
            PolicyError: the server refuses it, or is not ours and a setting of its memory was changed.
            EndpointError: the server is not there, or asks for its admin key.
        """
        self._check_open()
        if self.ours:
            self._memory.set_policy(policy)
            return
        foreign = sorted(set(difference(self._policy, policy)) - _TURN_PARTS)
        if foreign:
            raise PolicyError(
                f"the memory of {self._peer.dialect.name} is not set from here: {', '.join(foreign)} cannot be "
                f"changed, {', '.join(sorted(_TURN_PARTS))} can"
            )
        self._policy = policy

    def park(self, module: str, place: Literal["auto", "host", "disk"] = "auto") -> Move:
        """Move a module of the server off its device. Waits for the end.

        Raises:
            ModuleError: there is no such module, or the server is not ours.
        """
        self._known(module)
        return self._memory.park(module, place)

    def wake(self, module: str) -> Move:
        """Move a module of the server onto its device. Waits for the end."""
        self._known(module)
        return self._memory.wake(module)

    def reclaim(self) -> Event:
        """Let the server give unused memory back."""
        self._need_ours("give memory back")
        return self._memory.reclaim()

    def plan(self, policy: MemoryPolicy | None, workload: Workload, *, search: bool) -> Plan:
        """What a workload needs on the server's device."""
        self._need_ours("plan")
        return self._memory.plan(policy, workload, search=search)

    def image_tokens(self, size: tuple[int, int]) -> int | None:
        """Tokens of an image of ``(width, height)``; None where the server does not tell."""
        self._check_open()
        return self._memory.image_tokens(size) if self.ours else None

    def drop(self, conversation: str) -> None:
        """Forget a conversation, here and on a server of ours.

        Raises:
            ConversationError: there is none of this name, or a turn of it is under way.
        """
        there = self._memory if self.ours else None
        self._talks.drop(conversation, there)

    def stop(self) -> None:
        """Cancel every turn of this side. Returns at once."""
        for turn in self._talks.running:
            turn.cancel()

    def close(self) -> None:
        """Cancel what runs here, and let go of the endpoint, which goes on."""
        if self._closed:
            return
        self._closed = True
        self._loop.close()
        for turn, job in self._talks.running.items():
            turn.emit(job.answer("cancelled"))
        self._link.close()

    # a turn

    async def _ask(self, job: Any, messages: list[WireMessage], request: dict[str, Any]) -> Any:
        try:
            return await job.read(messages, request)
        except AdminOnlyError:
            # The server lets only its admin name conversations: it is asked without a name from now on.
            if not self._named:
                raise
            self._named = False
            request.get("extra_body", {}).pop("conversation", None)
            return await job.read(messages, request)

    def _cancel(self, turn: Turn) -> None:
        if turn.run is not None and not self._closed:
            self._talks.cancel(turn.run)

    def _job(self, turn: Turn, messages: tuple[Message, ...], *, live: bool) -> Any:
        form = self._peer.dialect.sound
        new = [wire_message(message, form) for message in messages]
        if live:
            from autoglm_lab.engine.remote.live_turn import LiveTurn

            return LiveTurn(
                turn, None, self._link, new, messages=messages, loop=self._loop, timeout=self._timeout, sound=form
            )
        from autoglm_lab.engine.remote.turn import RemoteTurn

        return RemoteTurn(turn, self._talker(), self._link, new)

    def _talker(self) -> Any:
        with self._lock:
            if self._chat is None:
                from autoglm_lab.engine.remote.chat import endpoint_chat

                peer = self._peer
                counted = peer.dialect.stream_options
                self._chat, client = endpoint_chat(
                    self._link, peer.model, timeout=self._timeout, retries=RETRIES, counted=counted
                )
                self._loop.at_end(client.aclose)
            return self._chat

    def _request(self, options: Mapping[str, Any], conversation: str, *, force: bool) -> dict[str, Any]:
        given = {name: value for name, value in options.items() if value is not None}
        settings = self.policy.replace(generation=given).generation
        # A server of ours has the policy; another one is told all of it.
        wanted = given if self.ours else settings.model_dump()
        dialect = self._peer.dialect
        for name in dialect.refused(wanted):
            self._note_once(f"generation.{name}", f"{dialect.name} does not take it: not sent")
        request = dialect.request(wanted)
        more: dict[str, Any] = {"conversation": conversation} if self.ours and self._named else {}
        more |= {"force": True} if self.ours and force else {}
        if more:
            request["extra_body"] = request.get("extra_body", {}) | more
        return request

    def _check_media(self, messages: Sequence[Message], *, live: bool) -> None:
        takes = self.capabilities.modalities
        for name, kind in (("image", ImagePart), ("audio", AudioPart)):
            if name not in takes and (media(messages, kind) or (live and kind is AudioPart)):
                raise MessageError(f"{self._peer.model} takes {', '.join(takes)}: leave the {name} out")
            if self._peer.dialect.drops_media and media(messages, kind):
                why = f"where its model does not read it, {self._peer.dialect.name} leaves it out without a word"
                self._note_once(name, why)

    def _note_once(self, subject: str, why: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            self._record(Event(time.time(), "note", subject, why=why))

    # asking the server

    def _known(self, module: str) -> None:
        self._need_ours("move modules")
        known = [info.name for info in self.modules()]
        if module not in known:
            raise ModuleError(f"this model has no module '{module}'; its modules are {', '.join(known)}")

    def _need_ours(self, what: str) -> None:
        self._check_open()
        if not self.ours:
            raise ModuleError(f"{self._peer.dialect.name} cannot {what} from here: only a server of autoglm_lab can")

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("this connection was closed: connect again")


def _weakly(engine: RemoteEngine) -> Any:
    """Asks without keeping the engine alive: a loop that runs would never let it go."""
    reference = weakref.ref(engine)

    async def ask(job: Any, messages: list[WireMessage], request: dict[str, Any]) -> Any:
        held = reference()
        if held is None:
            raise EngineClosedError("this connection was closed: connect again")
        return await held._ask(job, messages, request)  # noqa: SLF001 - its own

    return ask


def _feed(turn: Turn, pcm: Any) -> None:
    turn.run.feed(pcm)


def _close_question(turn: Turn, text: str | None) -> None:
    turn.run.ask(text)
