"""The chat: text, images and sounds in, streaming answers out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import traitlets

from autoglm_lab.engine.protocol import Engine, Turn
from autoglm_lab.errors import AdmissionError, LabError, MessageError
from autoglm_lab.widgets import sample_cards
from autoglm_lab.widgets.attachments import LIMIT, MOST_FILES, Attachment, read_attachments
from autoglm_lab.widgets.panel import Host, Panel, message_of
from autoglm_lab.widgets.settings import set_policy
from autoglm_lab.widgets.snapshot import Snapshot
from autoglm_lab.widgets.transcript import Transcript, transcript_of

GENERATION = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
_MOST_TEXT = 100_000
_MOST_PIXELS = 50_000_000


class ChatPanel(Panel):
    """One conversation at a time, with those there are to choose from.

    Attributes:
        messages: the finished messages of the conversation. Default empty.
        running: the answer under way; empty: none.
    """

    name = "chat_panel"
    parts = ("chat_messages",)

    messages: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    running = traitlets.Dict().tag(sync=True)

    def __init__(self, host: Host | None = None, **settings: Any) -> None:
        """As `Panel`."""
        self._conversation = "main"
        self._shown: tuple[str, int] = ("", -1)
        self._samples: list[dict[str, Any]] | None = None
        self._refused: dict[str, Callable[[], None]] = {}
        self._sizes: dict[tuple[int, int], None] = {}
        super().__init__(host, **settings)

    # what is shown; the refresher alone calls these

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        policy, able = snapshot.policy, snapshot.capabilities
        if self._samples is None:
            self._samples = sample_cards.cards(able.modalities)
        known = [conversation.name for conversation in snapshot.conversations]
        told = self._transcript().conversations() if self.host else []
        return {
            "conversation": self._conversation,
            "conversations": list(dict.fromkeys([*told, *known, self._conversation])),
            "elsewhere": any(c.name == self._conversation and c.turns for c in snapshot.conversations),
            "forgotten": self._conversation in told and self._conversation not in known,
            "modalities": list(able.modalities),
            "can_think": able.thinking,
            "thinking": policy.generation.thinking,
            "generation": {name: getattr(policy.generation, name) for name in GENERATION},
            "samples": self._samples,
            "warning": self.host.warning if self.host else None,
            "refused": self._conversation in self._refused,
            "can_force": able.memory_control,
            "limit": LIMIT,
            "image_tokens": self._image_tokens(),
            "most_files": MOST_FILES,
        }

    def _image_tokens(self) -> dict[str, int]:
        """What the images that are attached will take of the prompt, by ``widthxheight``."""
        costs = {} if self.host is None else {size: self.host.bench.image_tokens(size) for size in tuple(self._sizes)}
        return {f"{width}x{height}": tokens for (width, height), tokens in costs.items() if tokens is not None}

    def push(self) -> bool:
        """Send what was said since; True while an answer of any conversation is under way."""
        transcript = self._transcript()
        transcript.settle()
        reply = transcript.running(self._conversation)
        version = (self._conversation, transcript.version)
        if version != self._shown:
            self._shown = version
            self.messages = transcript.messages(self._conversation)
        self._put("running", reply.card() if reply else {})
        return transcript.any_running()

    def _transcript(self) -> Transcript:
        if self.host is None:
            raise LabError("this chat belongs to no dashboard")
        return transcript_of(self.host.bench)

    # what the person does

    def do_send(self, content: Mapping[str, Any], buffers: Sequence[memoryview]) -> None:
        """Say something: ``text``, ``files`` with one buffer each, ``sample`` names a sample file to add."""
        if self.host is None:
            return
        text = str(content.get("text", "")).strip()
        attachments = read_attachments(content.get("files", []), buffers)
        if len(text) > _MOST_TEXT:
            raise MessageError(f"a message takes at most {_MOST_TEXT:,} characters, this one has {len(text):,}")
        if not text and not attachments and not content.get("sample"):
            return
        force = content.get("force") is True
        say = self._saying(text, attachments, content.get("sample"), content.get("thinking"), force=force)
        self.run("send", say, lane="chat")

    def do_again(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Try what was refused last in this conversation all the same."""
        say = self._refused.pop(self._conversation, None)
        if self.host is not None and say is not None:
            self.run("send", say, lane="chat")

    def _saying(
        self, text: str, attachments: list[Attachment], sample: object, thinking: object, *, force: bool = False
    ) -> Callable[[], None]:
        host, conversation, transcript = self.host, self._conversation, self._transcript()
        if host is None:
            raise LabError("this chat belongs to no dashboard")
        engine: Engine = host.bench.engine

        def say() -> None:
            files = [*sample_cards.files(sample), *attachments]
            transcript.ask(conversation, text, [file.card() for file in files])
            parts = [file.part() for file in files] + ([{"type": "text", "text": text}] if text else [])
            options = {"thinking": thinking} if isinstance(thinking, bool) else {}
            options |= {"force": True} if force and engine.capabilities.memory_control else {}
            self._refused.pop(conversation, None)
            try:
                with transcript.speaking():
                    turn = engine.submit([{"role": "user", "content": parts}], conversation=conversation, **options)
            except (LabError, ValueError, OSError) as error:
                transcript.refuse(conversation, message_of(error))
                return
            transcript.answer(conversation, turn, host.wake)
            turn.on_change(lambda: ended(turn))

        def ended(turn: Turn) -> None:
            if isinstance(turn.error, AdmissionError):
                self._refused[conversation] = self._saying(text, attachments, sample, thinking, force=True)
                host.wake()

        return say

    def do_measure(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """An image of ``width`` and ``height`` was attached: show what it will take before it is sent."""
        size = int(content["width"]), int(content["height"])
        if self.host is None or min(size) < 1 or size[0] * size[1] > _MOST_PIXELS:
            return
        self._sizes[size] = None
        while len(self._sizes) > MOST_FILES:
            del self._sizes[next(iter(self._sizes))]
        self.host.wake()

    def do_stop(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        reply = self._transcript().running(self._conversation)
        if reply is not None:
            self.run("stop", reply.turn.cancel, lane="stop")

    def do_conversation(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Show another conversation; an empty name begins a new one."""
        known = self.state.get("conversations", [])
        name = str(content.get("name", "")).strip()[:60]
        self._conversation = name or next(f"chat {n}" for n in range(2, 10_000) if f"chat {n}" not in known)
        if self.host is not None:
            self.host.wake()

    def do_generation(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Change one of `GENERATION`, or ``thinking``."""
        setting = str(content["setting"])
        if self.host is None or setting not in (*GENERATION, "thinking"):
            return
        bench, value = self.host.bench, content["value"]
        self.run(setting, lambda: set_policy(bench, generation={setting: value}))
