"""`EngineBench`: what a person does with a model, wherever it runs: chat, memory, modules, dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from autoglm_lab.engine.protocol import ConversationInfo, Engine, Turn
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.memory.sampler import Sampler
from autoglm_lab.modules import Modules
from autoglm_lab.policy import MemoryPolicy


class EngineBench:
    """The part of a workbench that asks nothing but its engine.

    Attributes:
        name: of the model.
        engine: what answers; see `engine.protocol.Engine`.
        sampler: ledgers over time, and events.
        samplers: ledgers over time of each device; the first is `sampler`.
    """

    name: str
    engine: Engine
    sampler: Sampler
    samplers: tuple[Sampler, ...]

    # work

    def chat(
        self,
        text: str | None = None,
        *,
        image: Any = None,
        images: Any = (),
        audio: Any = None,
        system: str | None = None,
        conversation: str = "main",
        live: bool = False,
        thinking: bool | None = None,
        **generation: Any,
    ) -> Turn:
        """Say something to the model. Returns at once; ``await`` it to stream the answer into the cell.

        Args:
            image, images: PIL images, paths or bytes; shown before the text.
            audio: float samples 16 kHz mono, ``(samples, rate)``, a path or bytes; heard before the text.
            system: a system prompt, for the first turn of a conversation.
            conversation: which dialogue; a new name begins one.
            live: leave the question open: `Turn.feed` sound into it, then `Turn.ask`.
            thinking: let the model think first; None: as the policy says.
            generation: any setting of ``policy.generation`` for this turn alone.

        Raises:
            MessageError, MediaError: the input cannot be read.
            ModuleOffError: it needs a module that the policy keeps off.
        """
        media = [*([image] if image is not None else []), *images]
        content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in media]
        if audio is not None:
            content.append({"type": "audio", "audio": audio})
        if text is not None:
            content.append({"type": "text", "text": text})
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
        if content or not live:
            messages.append({"role": "user", "content": content})
        turn = self.engine.submit(messages, conversation=conversation, live=live, thinking=thinking, **generation)
        turn.presenter = _present
        return turn

    def image_tokens(self, image: Any) -> int | None:
        """How many tokens an image will take of the prompt; None where that cannot be told before."""
        del image
        return None

    def drop(self, conversation: str) -> None:
        """Forget a conversation and free its keys and values."""
        self.engine.drop(conversation)

    def stop(self) -> None:
        """Stop every answer under way."""
        self.engine.stop()

    # memory

    @property
    def policy(self) -> MemoryPolicy:
        """Every setting; assign another policy to change any of them."""
        return self.engine.policy

    @policy.setter
    def policy(self, policy: MemoryPolicy | Mapping[str, Any]) -> None:
        self.engine.set_policy(policy if isinstance(policy, MemoryPolicy) else MemoryPolicy.from_dict(policy))

    @property
    def memory(self) -> Ledger:
        """Who owns which bytes of the device, now."""
        return self.engine.ledger()

    def ledgers(self) -> tuple[Ledger, ...]:
        """As `memory`, one for each device that the model lies on."""
        return self.engine.ledgers()

    @property
    def modules(self) -> Modules:
        """The modules by name: ``wb.modules["audio"].park()``."""
        return Modules(self.engine)

    @property
    def conversations(self) -> tuple[ConversationInfo, ...]:
        return self.engine.conversations()

    @property
    def events(self) -> tuple[Event, ...]:
        """What happened to the memory, oldest first."""
        return self.sampler.events()

    def reclaim(self) -> Event:
        """Give unused memory back to the system; the event says how many bytes really went."""
        return self.engine.reclaim()

    def plan(
        self, policy: MemoryPolicy | None = None, workload: Workload | None = None, *, search: bool = True
    ) -> Plan:
        """What ``workload`` needs under ``policy`` where this model runs."""
        raise NotImplementedError

    # surfaces

    def dashboard(self, lang: Literal["en", "zh"] = "en") -> Any:
        """The same with widgets. Needs the extra ``lab``."""
        from autoglm_lab.widgets.dashboard import Dashboard

        return Dashboard(self, lang=lang)

    @property
    def closed(self) -> bool:
        return self.engine.closed

    def close(self) -> None:
        """Stop, and free everything that is held here. The workbench cannot be used afterwards."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "\n".join([self._title, *([] if self.closed else map(str, self.ledgers()))])

    def _repr_html_(self) -> str:
        name, _, rest = self._title.partition(" ")
        return f"<b>{name}</b> {rest}{'' if self.closed else ''.join(one._repr_html_() for one in self.ledgers())}"

    @property
    def _title(self) -> str:
        if self.closed:
            return f"{self.name} (closed)"
        able = self.engine.capabilities
        return " · ".join(part for part in (self.name, able.dtype, able.where) if part)


async def _present(turn: Turn) -> None:
    from autoglm_lab.widgets.stream import stream_into_cell

    await stream_into_cell(turn)
