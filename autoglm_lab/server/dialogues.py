"""Dialogues kept for ``previous_response_id``: in memory, few, and only for who began them."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from autoglm_lab.server.access import Role
from autoglm_lab.server.request_error import RequestError


@dataclass(frozen=True)
class Dialogue:
    """A response and the messages up to it. ``nbytes`` as JSON."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    role: Role
    nbytes: int


class Dialogues:
    """The last responses by id. Only the event loop calls this.

    Args:
        nbytes: most bytes of all together; the oldest go first.
    """

    def __init__(self, nbytes: int) -> None:
        self._most, self._held = nbytes, 0
        self._by_id: OrderedDict[str, Dialogue] = OrderedDict()

    def keep(self, response: dict[str, Any], messages: list[dict[str, Any]], role: Role) -> None:
        nbytes = len(json.dumps(messages)) + len(json.dumps(response))
        if nbytes > self._most:
            return
        self._by_id[response["id"]] = Dialogue(response, messages, role, nbytes)
        self._held += nbytes
        while self._held > self._most:
            self._held -= self._by_id.popitem(last=False)[1].nbytes

    def get(self, name: str, role: Role, param: str) -> Dialogue:
        """The dialogue that ended with a response.

        Raises:
            RequestError: 404, it is not kept (any more), or someone else's.
        """
        found = self._by_id.get(name)
        if found is None or found.role != role:
            message = f"there is no response of that {param}: it was never kept (store), or has made way for newer ones"
            raise RequestError(404, message, "response_not_found", param=param)
        self._by_id.move_to_end(name)
        return found

    def drop(self, name: str, role: Role) -> None:
        self._held -= self.get(name, role, "id").nbytes
        del self._by_id[name]
