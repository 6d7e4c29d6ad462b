"""Where a webhook may send to: public addresses only, against server-side request forgery.

    url ──▶ scheme, host, port ──▶ all addresses of the host, asked once ──▶ each is public ──▶ the first

The request then goes to the address that was checked, even if the name resolves to another one by then. Hosts
that the operator allows (BITMILL_WEBHOOK_ALLOWED_HOSTS) may be reached by plain http and have any address.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import httpx

from api.errors import Unprocessable
from compression.errors import Problem

LookUp = Callable[[str], Sequence[str]]
"""Host -> all of its addresses. Raises OSError, or UnicodeError for what cannot be a host."""

_POINTER = "/url"
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Target:
    """Where a message goes. url: with the host's name; address: where to connect in its stead."""

    url: httpx.URL
    address: str


def look_up(host: str) -> list[str]:
    """Ask the system's resolver."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def resolve(url: str, allowed_hosts: Collection[str], look_up: LookUp = look_up) -> Target:
    """Check a webhook's URL and where it leads.

    Raises:
        Unprocessable: `webhook_url_not_allowed`, or `webhook_host_not_found`.
    """
    parsed, host = _parse(url)
    is_allowed = host in allowed_hosts
    if parsed.scheme != "https" and not (is_allowed and parsed.scheme == "http"):
        raise _not_allowed("The URL is not https.")
    try:
        addresses = look_up(host)
    except (OSError, UnicodeError) as error:
        message = f"The host {host!r} has no address."
        hint = "Check its spelling, and that the server's resolver knows it."
        raise Unprocessable(Problem("webhook_host_not_found", message, hint, _POINTER)) from error
    if not is_allowed and not all(is_public(ip_address(address)) for address in addresses):
        raise _not_allowed(f"The host {host!r} has an address that is not public.")
    return Target(parsed, addresses[0])


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether packets to this address leave for the internet."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    inner = _embedded(address)
    if inner is not None:
        return is_public(inner)
    return address in _GLOBAL_UNICAST and address.is_global  # which Teredo is not


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets to an IPv6 address end at: mapped, 6to4, or through NAT64."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def _parse(url: str) -> tuple[httpx.URL, str]:
    """The URL as the client reads it, its host without a last dot; and that host."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise _not_allowed("This is not a URL.") from error
    host = parsed.raw_host.decode("ascii").removesuffix(".")
    if not host:
        raise _not_allowed("The URL has no host.")
    if parsed.userinfo:
        raise _not_allowed("The URL has a user name or a password.")
    if parsed.port is not None and not 0 < parsed.port < 1 << 16:
        raise _not_allowed(f"There is no port {parsed.port}.")
    return parsed.copy_with(host=host), host


def _not_allowed(message: str) -> Unprocessable:
    hint = (
        "Give an https URL of a host with public addresses. The server's operator can allow others: "
        "BITMILL_WEBHOOK_ALLOWED_HOSTS."
    )
    return Unprocessable(Problem("webhook_url_not_allowed", message, hint, _POINTER))
