"""Small servers that speak as vLLM, SGLang, llama-server, transformers serve and an unknown one do."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VLLM_METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 600.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="500"} 1.0
"""
SGLANG_METRICS = """\
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m"} 0.5
# TYPE sglang:num_used_tokens gauge
sglang:num_used_tokens{model_name="m"} 4000.0
# TYPE sglang:max_total_num_tokens gauge
sglang:max_total_num_tokens{model_name="m"} 8000.0
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 3.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{model_name="m"} 0.0
# TYPE sglang:cache_hit_rate gauge
sglang:cache_hit_rate{model_name="m"} 0.1
"""
LLAMA_METRICS = """\
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 4
"""
TRANSFORMERS_FIELDS = {
    "model",
    "messages",
    "stream",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "frequency_penalty",
    "stop",
    "seed",
    "chat_template_kwargs",
    "generation_config",
}


@dataclass
class Peer:
    """What a fake server says and hears.

    Attributes:
        pages: JSON or text by path.
        deltas: of the streamed answer.
        thought: the field that a thought comes in.
        usage: of the last chunk; None: none comes.
        accepts: the only fields that a request may have; None: any.
        breaks: how the stream ends: ``done``, ``cut`` (the connection goes), ``short`` (no finish reason), ``hang``,
            ``error`` (told in the stream).
        asked: bodies of the chat requests.
        gone: set when a client went away in the middle of an answer.
    """

    pages: dict[str, Any]
    deltas: Sequence[dict[str, Any]] = ({"content": "Hello"}, {"content": " there"})
    usage: dict[str, Any] | None = None
    accepts: set[str] | None = None
    key: str | None = None
    breaks: str = "done"
    asked: list[dict[str, Any]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    url: str = ""


def models(owner: str, **more: Any) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": owner} | more]}


def vllm() -> Peer:
    usage = {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43}
    return Peer(
        {"/v1/models": models("vllm", max_model_len=4096), "/metrics": VLLM_METRICS},
        deltas=({"reasoning": "Let me"}, {"reasoning": " see."}, {"content": "Hello"}, {"content": " there"}),
        usage=usage | {"prompt_tokens_details": {"cached_tokens": 32}},
    )


def sglang() -> Peer:
    return Peer(
        {"/v1/models": models("sglang", max_model_len=2048), "/metrics": SGLANG_METRICS},
        deltas=({"reasoning_content": "Let me see."}, {"content": "Hello there"}),
        usage={"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43},
    )


def llama() -> Peer:
    slots = [{"id": 0, "n_ctx": 4096, "n_past": 100}, {"id": 1, "n_ctx": 4096, "n_past": 28}]
    props = {"default_generation_settings": {"n_ctx": 4096}, "modalities": {"vision": True, "audio": False}}
    return Peer(
        {"/v1/models": models("llamacpp"), "/metrics": LLAMA_METRICS, "/slots": slots, "/props": props},
        deltas=({"reasoning_content": "Let me see."}, {"content": "Hello there"}),
        usage={"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43},
    )


def transformers() -> Peer:
    return Peer(
        {"/v1/models": models("HuggingFaceTB"), "/openapi.json": {"paths": {"/load_model": {}, "/reset": {}}}},
        deltas=(
            {"content": "<thi"},
            {"content": "nk>Let me see.</think><answer>Hello"},
            {"content": " there</answer>"},
        ),
        accepts=TRANSFORMERS_FIELDS,
    )


def other() -> Peer:
    return Peer({"/v1/models": models("someone")})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        peer: Peer = self.server.peer
        if peer.key and self.headers["Authorization"] != f"Bearer {peer.key}":
            return self._send(401, {"error": {"message": "no", "code": None}})
        page = peer.pages.get(self.path)
        return self._send(404, {"detail": "Not Found"}) if page is None else self._send(200, page)

    def do_POST(self) -> None:
        peer: Peer = self.server.peer
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        peer.asked.append(body)
        unknown = set(body) - (peer.accepts or set(body))
        if unknown:
            return self._send(422, {"detail": f"Unexpected fields in the request: {sorted(unknown)}"})
        return self._stream(peer, bool((body.get("stream_options") or {}).get("include_usage")))

    def _stream(self, peer: Peer, counted: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for delta in peer.deltas:
                self._chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            if peer.breaks == "hang":
                while not self.server.closing.wait(0.02):
                    self._raw(b": alive\n\n")
            if peer.breaks == "error":
                self._chunk({"error": {"message": "the device is on fire", "code": 500}})
            if peer.breaks == "cut":
                self.close_connection = True
                return
            if peer.breaks == "done":
                self._chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            if peer.usage and counted:
                self._chunk({"choices": [], "usage": peer.usage})
            if peer.breaks != "short":
                self._raw(b"data: [DONE]\n\n")
            self._raw(b"")
        except OSError:
            peer.gone.set()
            self.close_connection = True

    def _chunk(self, what: dict[str, Any]) -> None:
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        self._raw(f"data: {json.dumps(what if 'error' in what else head | what)}\n\n".encode())

    def _raw(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _send(self, status: int, page: Any) -> None:
        data = (page if isinstance(page, str) else json.dumps(page)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(page, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class PeerServer(ThreadingHTTPServer):
    """Serves a `Peer` until `close`."""

    daemon_threads = True

    def __init__(self, peer: Peer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.peer, self.closing = peer, threading.Event()
        peer.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
