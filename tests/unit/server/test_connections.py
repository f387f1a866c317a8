"""How the service treats a connection: what it says goes out at once, and an idle one is the client's to close."""

from __future__ import annotations

import socket

import httpx

import autoglm_lab as lab
from autoglm_lab.server.run import Serving


def test_small_pieces_are_not_held_back(wb: lab.Workbench, served: Serving) -> None:
    with httpx.Client(base_url=served.url) as client:
        client.get("/models")
        here = client.get("/models").extensions["network_stream"].get_extra_info("client_addr")
        server = served._server
        transports = [connection.transport for connection in server.server_state.connections]
        (mine,) = [one for one in transports if one.get_extra_info("peername") == here]
        assert mine.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_idle_connection_outlasts_the_clients_own_patience(served: Serving) -> None:
    clients_close_after = httpx.Limits().keepalive_expiry
    assert clients_close_after is not None
    assert served._server.config.timeout_keep_alive > 2 * clients_close_after
