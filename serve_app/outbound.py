"""HTTP to addresses that a user named: https, public addresses only, checked after resolution, no redirects followed.

The connection goes to the very address that was checked, so a name that resolves differently the second time gains
nothing.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterable
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpcore

from viewmesh.errors import ViewmeshError

VISIBLE = re.compile(r"[!-~]+")


class Refused(ViewmeshError):
    """The address may not be called."""

    code = "address_refused"


def check_url(url: str, *, private_addresses: bool) -> None:
    """Raises Refused unless the URL's form is acceptable; its name is resolved only when it is called."""
    if not VISIBLE.fullmatch(url):
        raise Refused(
            f"{url[:200]!r} is not a URL: it has other characters than visible ASCII.",
            hint="Write the name as xn--…, and percent-encode the path.",
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise Refused(f"{url[:200]!r} is not a URL.") from error
    if parts.scheme not in ("https", "http") or not host:
        raise Refused("The address must be an https URL.")
    if parts.username or parts.password:
        raise Refused("The address must not carry a user name or password.")
    if private_addresses:
        return
    if parts.scheme != "https":
        raise Refused("The address must be https.")
    if port not in (None, 443, 8443):
        raise Refused(f"Port {port} is not allowed; 443 and 8443 are.")
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        if host.lower().rstrip(".").endswith((".local", ".internal", "localhost")):
            raise Refused(f"{host} is a private name.") from None
        return
    if not is_public(literal):
        raise Refused(f"{host} is not a public address.")


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to public addresses."""

    def __init__(self, private_addresses: bool) -> None:
        self.private_addresses = private_addresses
        self.inner: Any = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            found = await asyncio.wait_for(loop.getaddrinfo(host, port, type=socket.SOCK_STREAM), timeout)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"cannot resolve {host}") from error
        addresses = [str(info[4][0]) for info in found]
        if not self.private_addresses:
            for address in addresses:  # one private answer among public ones is an attack, not an accident
                if not is_public(ipaddress.ip_address(address.split("%")[0])):
                    raise Refused(f"{host} resolves to an address that is not public.")
        return await self.inner.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("unix sockets are not for users")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@cache
def trusted() -> ssl.SSLContext:
    """The system's certificates, read once: that takes an event loop as long as twenty requests."""
    return ssl.create_default_context()


async def request(
    method: str,
    url: str,
    *,
    headers: dict[str, str] | None = None,
    content: bytes | None = None,
    timeout_s: float = 10.0,
    max_bytes: int = 64 * 1024,
    private_addresses: bool = False,
) -> tuple[int, bytes]:
    """(status, body); raises Refused, httpcore's errors, TimeoutError. A body beyond max_bytes is refused."""
    check_url(url, private_addresses=private_addresses)
    trust = await asyncio.to_thread(trusted)
    limit = {"connect": timeout_s, "read": timeout_s, "write": timeout_s, "pool": timeout_s}
    async with (
        asyncio.timeout(timeout_s * 3),
        httpcore.AsyncConnectionPool(network_backend=CheckedBackend(private_addresses), ssl_context=trust) as pool,
        pool.stream(
            method, url, headers=list((headers or {}).items()), content=content, extensions={"timeout": limit}
        ) as response,
    ):
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) > max_bytes:
                raise Refused(f"The answer of {urlsplit(url).hostname} is larger than {max_bytes} bytes.")
        return response.status, bytes(body)
