"""Media fetched for a client: only from hosts that are allowed by name, and never from inside this network."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from autoglm_lab.errors import MediaError

_SECONDS = 15.0
_CHUNK = 1 << 16
# What leads to another network behind an address that looks public.
_TUNNELS = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(
    url: str,
    domains: Sequence[str],
    most: int,
    what: str,
    *,
    connect: Callable[[Address, str, float], Any] | None = None,
) -> bytes:
    """The bytes behind an ``https`` address.

    The name is looked up once and the connection goes to the very address that was checked, so that a second answer of
    the name server cannot lead elsewhere. Redirects are not followed.

    Args:
        domains: the hosts that are allowed, exactly as named.
        most: bytes.
        connect: opens the connection, given address, host name and seconds; None: TLS on port 443.

    Raises:
        MediaError: not allowed, not reached, or too large.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise MediaError(f"the address of the {what} cannot be read") from None
    if host not in domains:
        allowed = f"only from {', '.join(domains)}" if domains else "from nowhere"
        raise MediaError(
            f"the {what} must be a data URI (data:…;base64,…): this service fetches {allowed} "
            "(--allow-media-domain of the service)"
        )
    if parts.scheme != "https" or port not in (None, 443) or parts.username or parts.password:
        raise MediaError(f"the {what} is fetched by https at its usual port alone, without a user")
    deadline = time.monotonic() + _SECONDS
    try:
        connection = (connect or _secure)(public_address(host), host, _SECONDS)
    except (OSError, UnicodeError):
        raise MediaError(f"cannot fetch the {what}: {host} was not reached") from None
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": host, "Accept-Encoding": "identity", "User-Agent": "autoglm-lab"}
        connection.request("GET", target, headers=headers)
        return _body(connection.getresponse(), most, what, host, deadline)
    except (OSError, http.client.HTTPException, UnicodeError):
        raise MediaError(f"cannot fetch the {what}: {host} did not send it") from None
    finally:
        connection.close()


def public_address(host: str) -> Address:
    """An address of a host that lies outside of this network.

    Raises:
        MediaError: one of its addresses does not: then none is trusted.
        OSError: it has none.
    """
    found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise MediaError(f"cannot fetch from {host}: it leads to an address inside of this network")
    return addresses[0]


def is_public(address: Address) -> bool:
    """Whether anyone on the internet could reach it: not private, not local, not a tunnel to such."""
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is not None:
            return is_public(mapped)
        if any(address in tunnel for tunnel in _TUNNELS):
            return False
    return address.is_global and not address.is_multicast


def _secure(address: Address, host: str, seconds: float) -> http.client.HTTPSConnection:
    connection = http.client.HTTPSConnection(host, timeout=seconds)
    plain = socket.create_connection((str(address), 443), timeout=seconds)
    try:
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise
    return connection


def _body(response: http.client.HTTPResponse, most: int, what: str, host: str, deadline: float) -> bytes:
    if 300 <= response.status < 400:
        raise MediaError(f"cannot fetch the {what}: {host} redirects, which is not followed: give the final address")
    if response.status != 200:
        raise MediaError(f"cannot fetch the {what}: {host} answered {response.status}")
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise MediaError(f"cannot fetch the {what}: {host} sends it compressed")
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > most:
            raise MediaError(f"the {what} has more than {most:,} bytes, the limit")
        if time.monotonic() > deadline:
            raise MediaError(f"cannot fetch the {what}: {host} took more than {_SECONDS:g} s")
    return bytes(body)
