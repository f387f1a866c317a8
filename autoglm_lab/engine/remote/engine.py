"""The engine behind an endpoint: a server of ours with every switch, any other one as far as it tells and takes."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from autoglm_lab.engine.messages import AudioPart, ImagePart, Message, media, read_messages
from autoglm_lab.engine.policy_difference import difference
from autoglm_lab.engine.protocol import Capabilities, ConversationInfo, ModuleInfo, Turn, TurnListener
from autoglm_lab.engine.remote.history import History, WireMessage, wire_message
from autoglm_lab.engine.remote.link import AdminOnlyError, Link
from autoglm_lab.engine.remote.loop import Loop
from autoglm_lab.engine.remote.memory import Recent, ServerMemory
from autoglm_lab.engine.remote.peer import Peer
from autoglm_lab.engine.service_load import ServiceLoad
from autoglm_lab.errors import (
    ConversationError,
    EndpointError,
    EngineClosedError,
    LabError,
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
        self._histories: dict[str, History] = {}
        self._gates: dict[str, asyncio.Lock] = {}
        self._recent = Recent()
        self._memory = ServerMemory(link, self._recent)
        self._lock = threading.Lock()
        self._listeners: tuple[TurnListener, ...] = ()
        self._running: dict[Turn, Any] = {}
        self._chat: Any = None
        self._named = True
        self._warned: set[str] = set()
        self._rate: float | None = None
        self._latest_phase = "idle"
        self._closed = False
        self._loop = Loop()
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
        reading = [job.phase for job in tuple(self._running.values())]
        if reading:
            return "decode" if "decode" in reading else "prefill"
        return self._latest_phase

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed of the last answer, as seen from here."""
        return self._rate

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
        with self._lock:
            return tuple(history.info(name) for name, history in self._histories.items())

    # what can be asked

    def submit(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        conversation: str = "main",
        live: bool = False,
        replace: bool = False,
        **options: Any,
    ) -> Turn:
        """Append messages to a conversation and answer them. Returns at once. See `LocalEngine.submit`.

        Raises:
            MessageError, MediaError: the messages cannot be read, or the model does not take what is in them.
            PolicyError: an option does not exist or cannot be.
        """
        self._check_open()
        if live:
            raise MessageError("live sound needs the model in this kernel: send the sound with wb.chat(..., audio=…)")
        read = read_messages(messages)
        self._check_media(read)
        request = self._request(options, conversation)
        turn = Turn(conversation, cancel=self._cancel)
        new = [wire_message(message, self._peer.dialect.sound) for message in read]
        with self._lock:
            history = self._histories.setdefault(conversation, History())
            history.busy += 1
        kept = "resend" if replace else self.policy.history.media
        job = self._job(turn)
        self._running[turn] = job
        turn.run = job
        self._loop.run(self._answer(job, history, new, kept, request, replace=replace))
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

    def drop(self, conversation: str) -> None:
        """Forget a conversation, here and on a server of ours.

        Raises:
            ConversationError: there is none of this name, or a turn of it is under way.
        """
        with self._lock:
            history = self._histories.get(conversation)
            if history is not None and history.busy:
                raise ConversationError(f"conversation '{conversation}' has a turn under way: stop it first")
        if self.ours and any(info.name == conversation for info in self.conversations()):
            self._memory.drop(conversation)
        elif history is None:
            names = ", ".join(info.name for info in self.conversations()) or "none"
            raise ConversationError(f"there is no conversation '{conversation}'; there are: {names}")
        with self._lock:
            self._histories.pop(conversation, None)

    def stop(self) -> None:
        """Cancel every turn of this side. Returns at once."""
        for turn in tuple(self._running):
            turn.cancel()

    def close(self) -> None:
        """Cancel what runs here, and let go of the endpoint, which goes on."""
        if self._closed:
            return
        self._closed = True
        self._loop.close()
        for turn, job in tuple(self._running.items()):
            turn.emit(job.answer("cancelled"))
        self._link.close()

    # a turn

    async def _answer(
        self,
        job: Any,
        history: History,
        new: list[WireMessage],
        media_kept: Literal["resend", "strip"],
        request: dict[str, Any],
        *,
        replace: bool,
    ) -> None:
        turn, job.task = job.turn, asyncio.current_task()
        try:
            async with self._gates.setdefault(turn.conversation, asyncio.Lock()):
                if replace:
                    history.messages.clear()
                messages = history.asking(new, media=media_kept)
                try:
                    # Stopped before it began: nothing is asked.
                    answer = job.answer("cancelled") if turn.cancelled else await self._read(job, messages, request)
                except asyncio.CancelledError:
                    answer = job.answer("cancelled")
                self._keep(history, new, answer)
        except asyncio.CancelledError:
            self._ended(turn, history)
            turn.emit(job.answer("cancelled"))
        except LabError as error:
            self._ended(turn, history)
            turn.fail(error)
        except Exception as error:  # noqa: BLE001 - whoever waits for the turn gets it
            self._ended(turn, history)
            turn.fail(EndpointError(f"{self._link.host}: {type(error).__name__}: {error}"))
        else:
            self._ended(turn, history)
            turn.emit(answer)

    async def _read(self, job: Any, messages: list[WireMessage], request: dict[str, Any]) -> Any:
        try:
            return await job.read(messages, request)
        except AdminOnlyError:
            # The server lets only its admin name conversations: it is asked without a name from now on.
            if not self._named:
                raise
            self._named = False
            request.get("extra_body", {}).pop("conversation", None)
            return await job.read(messages, request)

    def _keep(self, history: History, new: list[WireMessage], answer: Any) -> None:
        if answer.finish_reason == "cancelled" and not answer.text:
            return
        usage = answer.usage
        history.messages += [*new, {"role": "assistant", "content": answer.text}]
        history.turns += 1
        history.tokens = usage.prompt_tokens + usage.completion_tokens
        history.prompt += usage.prompt_tokens
        history.cached += usage.cached_tokens
        self._rate = answer.timings.tokens_per_second or self._rate

    def _ended(self, turn: Turn, history: History) -> None:
        with self._lock:
            history.busy -= 1
            if not (history.busy or history.messages):
                self._histories = {name: one for name, one in self._histories.items() if one is not history}
        self._running.pop(turn, None)
        self._recent.forget()

    def _cancel(self, turn: Turn) -> None:
        job = turn.run
        if job is not None and not self._closed:
            self._loop.call(lambda: job.task and job.task.cancel())

    def _job(self, turn: Turn) -> Any:
        from autoglm_lab.engine.remote.turn import RemoteTurn

        return RemoteTurn(turn, self._talker(), self._link)

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

    def _request(self, options: Mapping[str, Any], conversation: str) -> dict[str, Any]:
        given = {name: value for name, value in options.items() if value is not None}
        settings = self.policy.replace(generation=given).generation
        # A server of ours has the policy; another one is told all of it.
        wanted = given if self.ours else settings.model_dump()
        dialect = self._peer.dialect
        for name in dialect.refused(wanted):
            self._note_once(f"generation.{name}", f"{dialect.name} does not take it: not sent")
        request = dialect.request(wanted)
        if self.ours and self._named:
            request["extra_body"] = request.get("extra_body", {}) | {"conversation": conversation}
        return request

    def _check_media(self, messages: Sequence[Message]) -> None:
        takes = self.capabilities.modalities
        for name, kind in (("image", ImagePart), ("audio", AudioPart)):
            if name not in takes and media(messages, kind):
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
