"""Who may do what: keys, the admin's, and web pages of other origins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

import autoglm_lab as lab
from autoglm_lab.errors import LabError
from autoglm_lab.server.settings import ServerSettings
from tests.unit.server.payloads import user

PATH = "/chat/completions"
SAY = {"messages": [user("Hi")], "max_tokens": 1}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "header", [{}, bearer("wrong"), {"authorization": "Bearer"}, bearer("client-kex"), {"authorization": "client-key"}]
)
def test_without_a_valid_key_nothing_is_told(another: Callable[..., httpx.Client], header: dict[str, str]) -> None:
    client = another(api_key="client-key")
    for method, path in [("POST", PATH), ("GET", "/memory"), ("GET", "/models"), ("POST", "/memory/reclaim")]:
        response = client.request(method, path, json=SAY if path == PATH else None, headers=header)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    root = str(client.base_url).removesuffix("/v1/")
    assert client.get(f"{root}/metrics", headers=header).status_code == 401
    assert client.get(f"{root}/health", headers=header).status_code == 200


def test_keys_are_compared_in_constant_time(another: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoglm_lab.server import access

    compared: list[tuple[bytes, bytes]] = []
    real = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    another(api_key="client-key", admin_key="admin-key").get("/models", headers=bearer("guess"))
    assert compared == [(b"guess", b"admin-key"), (b"guess", b"client-key")]


def test_changes_are_the_admins(another: Callable[..., httpx.Client], wb: lab.Workbench) -> None:
    client = another(api_key="client-key", admin_key="admin-key")
    calls: list[tuple[str, str, Any]] = [
        ("PATCH", "/memory/policy", {"kv": {"max_tokens": 64}}),
        ("POST", "/memory/modules/audio/park", None),
        ("POST", "/memory/reclaim", None),
        ("DELETE", "/memory/conversations/x", None),
        ("POST", PATH, {**SAY, "conversation": "main"}),
    ]
    for method, path, body in calls:
        response = client.request(method, path, json=body, headers=bearer("client-key"))
        assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_only")
    assert wb.policy == lab.MemoryPolicy()
    assert client.post(PATH, json=SAY, headers=bearer("client-key")).status_code == 200
    assert client.patch("/memory/policy", json=calls[0][2], headers=bearer("admin-key")).status_code == 200
    assert wb.policy.kv.max_tokens == 64


def test_a_response_of_another_key_is_not_found(another: Callable[..., httpx.Client]) -> None:
    client = another(api_key="client-key", admin_key="admin-key")
    body = {"input": "Hi", "max_output_tokens": 1}
    name = client.post("/responses", json=body, headers=bearer("admin-key")).json()["id"]
    assert client.get(f"/responses/{name}", headers=bearer("client-key")).status_code == 404
    assert client.get(f"/responses/{name}", headers=bearer("admin-key")).status_code == 200


def test_pages_of_other_origins_are_kept_out(another: Callable[..., httpx.Client]) -> None:
    client = another(origins=("https://lab.example.org",))
    own = str(client.base_url).removesuffix("/v1/")
    for origin, status in [("https://evil.test", 403), ("null", 403), ("https://lab.example.org", 200), (own, 200)]:
        assert client.post(PATH, json=SAY, headers={"origin": origin}).status_code == status


def test_a_name_that_was_made_to_lead_here_is_refused(client: httpx.Client) -> None:
    response = client.get("/models", headers={"host": "evil.test"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_form_of_a_web_page_is_no_request(client: httpx.Client, content_type: str) -> None:
    response = client.post(PATH, content=b'{"messages": []}', headers={"content-type": content_type})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines: give it a key"),
        ({"host": "192.168.1.5", "admin_key": "a"}, "can be reached from other machines"),
        ({"api_key": "same", "admin_key": "same"}, "must not be the clients' key"),
        ({"api_key": "kéy"}, "printable ASCII"),
        ({"prot": 1}, "prot: .*settings are host, port"),
        ({"running": 0}, "running: .*greater than or equal to 1"),
    ],
)
def test_settings_that_would_be_unsafe_or_wrong_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LabError, match=message):
        ServerSettings(**settings)


def test_this_machine_alone_needs_no_key() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert ServerSettings(host=host).loopback
    assert not ServerSettings(host="0.0.0.0", api_key="k").loopback
