"""A small stand-in for the Hugging Face hub on this machine, which the real client talks to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by id, each files by name.

    Attributes:
        asked: ``METHOD path`` of every request.
        tokens: the ``Authorization`` of every request; empty where there was none.
        private: ids that need the token ``Bearer secret``.
        gated: ids that nobody may read.
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = repositories
        self.asked: list[str] = []
        self.tokens: list[str] = []
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.url = ""

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {line.rpartition("/")[2] for line in self.asked if line.startswith("GET") and "/resolve/" in line}


@contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    """A hub under ``url`` until the end of the block."""
    hub = Hub(repositories)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "")
        hub.asked.append(f"{self.command} {path}")
        hub.tokens.append(token)
        repo_id = next((one for one in hub.repositories if f"/{one}" in path), None)
        if repo_id is None or (repo_id in hub.private and token != "Bearer secret"):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repo_id in hub.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif path.startswith("/api/"):
            self._send(200, json.dumps(_api(path, hub.repositories[repo_id], repo_id)).encode(), {})
        else:
            self._file(hub.repositories[repo_id], path.rpartition("/")[2])

    def _file(self, files: Mapping[str, bytes], name: str) -> None:
        if name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        tag = hashlib.sha1(files[name]).hexdigest()
        self._send(200, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _api(path: str, files: Mapping[str, bytes], repo_id: str) -> object:
    if "/tree/" in path:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
    siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
    return {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": siblings, "tags": []}
