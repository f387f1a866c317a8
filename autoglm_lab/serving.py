"""A workbench as a service: `serve` from a notebook, and what the command `autoglm-lab serve` runs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from autoglm_lab.errors import EngineClosedError
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.server.settings import check_settings
from autoglm_lab.workbench import Workbench

if TYPE_CHECKING:
    from autoglm_lab.server.run import Serving


def serve(workbench: Workbench, **settings: Any) -> Serving:
    """Serve the model of a workbench beside the notebook that holds it. Returns at once.

    Args:
        settings: ``host``, ``port`` (0: a free one), ``api_key`` and all others of `server.settings.ServerSettings`.

    Raises:
        LabError: a setting cannot be, the address is taken, or the extra ``serve`` is not installed.

    Example:
        >>> with serve(wb, port=0) as service:  # doctest: +SKIP
        ...     print(service.url)
        http://127.0.0.1:40123/v1
    """
    return listening(workbench, **settings).start()


def listening(workbench: Workbench, **settings: Any) -> Serving:
    """The same, not started yet: `Serving.run` serves in the foreground."""
    checked = check_settings(**settings)
    from autoglm_lab.server.app import build_app
    from autoglm_lab.server.run import Serving

    return Serving(build_app(workbench.engine, checked, _planner(workbench)))


def _planner(workbench: Workbench) -> Any:
    """Plans without keeping the workbench alive: a service that was stopped may outlive it."""
    reference = weakref.ref(workbench)

    def plan(policy: MemoryPolicy | None, workload: Workload | None, search: bool) -> Plan:
        held = reference()
        if held is None:
            raise EngineClosedError("this workbench was closed: load the model again")
        return held.plan(policy, workload, search=search)

    return plan
