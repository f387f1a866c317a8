"""What holds for every tier: one thread, one seed, no hub, and no connection beyond this machine."""

from __future__ import annotations

import ipaddress
import operator
import os
import random
import socket
import sys

import pytest

# Before torch and transformers are imported by any test, and inherited by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test sees the same random weights alone, among all others, and on every machine."""
    random.seed(0)
    for library, seed in (("torch", "manual_seed"), ("numpy", "random.seed")):
        if library in sys.modules:
            operator.attrgetter(seed)(sys.modules[library])(0)


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the default path needs a network: a connection to another machine fails the test."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            assert isinstance(address, tuple)
            host = str(address[0])
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                pytest.fail(f"a test tried to reach {host}; tests stay on this machine")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
