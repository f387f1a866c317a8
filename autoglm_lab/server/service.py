"""`Service`: what the endpoints of one app share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.requests import HTTPConnection

from autoglm_lab.engine.local import LocalEngine
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.server.access import Role
from autoglm_lab.server.dialogues import Dialogues
from autoglm_lab.server.metrics import Metrics
from autoglm_lab.server.places import Places
from autoglm_lab.server.request_error import RequestError
from autoglm_lab.server.settings import ServerSettings

Planner = Callable[[MemoryPolicy | None, Workload | None, bool], Plan]
"""What a plan is asked of: policy (None: as it is), workload, whether to look for alternatives."""


@dataclass
class Service:
    """The engine, how it is offered, and what is counted of it.

    Attributes:
        stopping: it was told to stop: nothing new is begun.
        began: seconds since the epoch.
    """

    engine: LocalEngine
    settings: ServerSettings
    plan: Planner
    metrics: Metrics
    places: Places
    dialogues: Dialogues
    stopping: bool = False
    began: float = field(default_factory=time.time)

    @property
    def names(self) -> tuple[str, ...]:
        """The model's own name first, then those that it answers to as well."""
        return tuple(dict.fromkeys([self.engine.capabilities.model, *self.settings.names]))

    def check_model(self, name: str | None) -> str:
        """The name of the model that answers.

        Raises:
            RequestError: 404, another model was asked for.
        """
        if name is not None and name not in self.names:
            shown = name if len(name) <= 100 and name.isprintable() else "of that name"
            message = f"there is no model {shown!r} here; there is {', '.join(self.names)}"
            raise RequestError(404, message, "model_not_found", param="model")
        return self.names[0] if name is None else name


def service_of(connection: HTTPConnection) -> Service:
    """The service that a call came to."""
    return cast("Service", connection.app.state.service)


def role_in(connection: HTTPConnection) -> Role:
    """What the gate made of who calls."""
    role: Any = connection.scope["state"]["role"]
    return cast("Role", role)
