"""Who may do what: keys, compared in constant time, and web pages of other origins kept out."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

from autoglm_lab.server.request_error import RequestError
from autoglm_lab.server.settings import ServerSettings, is_loopback

Role = Literal["nobody", "client", "admin"]
_OPEN = ("/health", "/ready")
_CHANGING = ("/v1/memory/policy", "/v1/memory/modules/", "/v1/memory/reclaim", "/v1/memory/conversations/")


def role_of(settings: ServerSettings, headers: Mapping[str, str]) -> Role:
    """What the key in the headers makes of who sent it.

    Args:
        headers: names in lower case.
    """
    if settings.api_key is None and settings.admin_key is None:
        return "admin"
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = key.strip() if scheme.lower() == "bearer" else ""
    is_admin, is_client = _same(given, settings.admin_key), _same(given, settings.api_key)
    if is_admin:
        return "admin"
    return "client" if is_client or settings.api_key is None else "nobody"


def needed(method: str, path: str) -> Role:
    """What a call asks for: changes of memory and policy are the admin's."""
    if path in _OPEN:
        return "nobody"
    if method not in ("GET", "HEAD") and path.startswith(_CHANGING):
        return "admin"
    return "client"


def check_access(settings: ServerSettings, method: str, path: str, headers: Mapping[str, str]) -> Role:
    """The role of a call.

    Raises:
        RequestError: 401 without a valid key, 403 where it does not go so far, or for a web page of another origin.
    """
    _check_page(settings, headers)
    role, wanted = role_of(settings, headers), needed(method, path)
    if wanted == "nobody" or role in ("admin", wanted):
        return role
    if role == "nobody":
        raise RequestError(401, "a valid key is needed: send it as 'Authorization: Bearer …'", "invalid_api_key")
    how = "send the admin key" if settings.admin_key else "start the service with an admin key (--admin-key)"
    raise RequestError(403, f"this changes memory or settings, which clients may not: {how}", "admin_only")


def check_asked(settings: ServerSettings, role: Role, *, conversation: str | None, force: bool = False) -> None:
    """What of a question is the admin's alone.

    Args:
        conversation: a named one is shared with whoever knows its name, the notebook too.
        force: what the plan refuses is tried all the same, beside everybody's answers.

    Raises:
        RequestError: the key does not go so far.
    """
    if role == "admin":
        return
    how = "send the admin key" if settings.admin_key else "start the service with an admin key (--admin-key)"
    if force:
        message = f"'force' tries what does not fit, which needs the admin's right: {how}"
        raise RequestError(403, message, "admin_only", param="force")
    if conversation is not None:
        message = f"'conversation' names a dialogue that others may share, which needs the admin's right: {how}"
        raise RequestError(403, message, "admin_only", param="conversation")


def _check_page(settings: ServerSettings, headers: Mapping[str, str]) -> None:
    """Against web pages that a person of this machine has open: another origin, or a name that leads here."""
    host = headers.get("host", "")
    name = urlsplit(f"//{host}").hostname or ""
    if settings.loopback and name and not is_loopback(name):
        raise RequestError(403, "this service answers to names of its own machine alone: use 127.0.0.1", "wrong_host")
    origin = headers.get("origin")
    if origin is None or origin in settings.origins:
        return
    if origin.partition("://")[2] != host:
        raise RequestError(
            403, "web pages of other origins may not call: --allow-origin names those that may", "origin"
        )


def _same(given: str, key: str | None) -> bool:
    # Compared also where there is none, so that the time does not tell.
    return hmac.compare_digest(given.encode(), (key or "").encode()) and bool(key)
