"""Webhooks lead to the internet, or to hosts that the operator allows, however their URLs are spelled."""

from __future__ import annotations

from ipaddress import ip_address
from socket import gaierror

import pytest

from api.errors import Unprocessable
from api.webhooks.addresses import is_public, resolve

PUBLIC = ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::5db8:d822", "::ffff:93.184.216.34")
PRIVATE = (
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",  # shared by carriers
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",  # where clouds keep credentials
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.168.1.1",
    "198.18.0.1",
    "203.0.113.7",
    "224.0.0.1",
    "233.252.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",  # IPv4-compatible, long out of use
    "fe80::1",
    "fc00::1",
    "fd00:ec2::254",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "100::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",  # NAT64 of 127.0.0.1
    "64:ff9b::a00:1",
    "64:ff9b:1::5db8:d822",  # somebody's own NAT64
    "2002:7f00:1::",  # 6to4 of 127.0.0.1
    "2002:a9fe:a9fe::1",
    "2001:0:7f00:1::f5ff:fffe",  # Teredo: server 127.0.0.1, client 10.0.0.1
    "2001:0:5db8:d822::a247:27dd",  # Teredo: server and client public, but nobody serves there
)


def refused(url: str, *addresses: str, allowed: tuple[str, ...] = ()) -> str:
    """The code of the refusal of a URL whose host has these addresses."""
    with pytest.raises(Unprocessable) as error:
        resolve(url, allowed, lambda _host: addresses)
    (problem,) = error.value.problems
    assert (problem.pointer, bool(problem.hint)) == ("/url", True)
    assert not any(address in problem.message for address in addresses if address not in url)
    return problem.code


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_private(address: str) -> None:
    assert not is_public(ip_address(address))
    assert refused("https://example.com/", address) == "webhook_url_not_allowed"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "017700000001",
        "0177.0.0.1",
        "0",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "127.0.0.1.",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[fe80::1]",
        "[fc00::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "\uff11\uff12\uff17.0.0.1",  # digits of full width
        "127\u30020\u30020\u30021",  # ideographic full stops
    ],
)
def test_spellings_of_this_machine_and_its_network(host: str) -> None:
    """Asked of the system's own resolver, which answers these without a network."""
    with pytest.raises(Unprocessable) as error:
        resolve(f"https://{host}/hook", ())
    assert error.value.code in ("webhook_url_not_allowed", "webhook_host_not_found")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "//example.com/",
        "example.com",
        "https:///path",
        "https://./",
        "https://user@example.com/",
        "https://user:pass@example.com/",
        "https://example.com\\@127.0.0.1/",
        "https://example.com:0/",
        "https://example.com:65536/",
        "https://example.com:port/",
        "https://exa\nmple.com/",
        "https://[::1/",
        "https://" + "a" * 70_000,
    ],
)
def test_urls_that_cannot_be(url: str) -> None:
    assert refused(url, PUBLIC[0]) == "webhook_url_not_allowed"


def test_every_address_of_a_name_counts() -> None:
    assert refused("https://example.com/", PUBLIC[0], "10.0.0.1") == "webhook_url_not_allowed"
    assert refused("https://example.com/", "10.0.0.1", PUBLIC[0]) == "webhook_url_not_allowed"


def test_the_target_is_an_address_that_was_checked() -> None:
    target = resolve("https://Example.com.:8443/hook?a=b#c", (), lambda _host: PUBLIC)
    assert str(target.url) == "https://example.com:8443/hook?a=b#c"
    assert target.address == PUBLIC[0]


def test_the_name_is_looked_up_once() -> None:
    asked: list[str] = []

    def look_up(host: str) -> tuple[str, ...]:
        asked.append(host)
        return PUBLIC

    resolve("https://example.com./", (), look_up)
    assert asked == ["example.com"]


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".com"])
def test_names_that_cannot_be(host: str) -> None:
    with pytest.raises(Unprocessable) as error:
        resolve(f"https://{host}/", ())
    assert error.value.code == "webhook_host_not_found"


def test_names_without_an_address() -> None:
    def look_up(_host: str) -> list[str]:
        raise gaierror("Name or service not known")

    with pytest.raises(Unprocessable) as error:
        resolve("https://example.com/", (), look_up)
    assert error.value.code == "webhook_host_not_found"


def test_allowed_hosts_may_be_anywhere() -> None:
    allowed = ("hooks.internal", "10.0.0.5", "::1")
    for url in (
        "http://hooks.internal:8080/",
        "https://HOOKS.internal./",
        "http://10.0.0.5/",
        "http://[::1]/",
    ):
        assert resolve(url, allowed, lambda _host: ["10.0.0.5"]).address == "10.0.0.5"
    for url in ("http://hooks.internal.evil.com/", "http://sub.hooks.internal/", "https://10.0.0.6/"):
        assert refused(url, "10.0.0.5", allowed=allowed) == "webhook_url_not_allowed"
    assert refused("ftp://hooks.internal/", "10.0.0.5", allowed=allowed) == "webhook_url_not_allowed"
    with_user = "http://user:pass@hooks.internal/"
    assert refused(with_user, "10.0.0.5", allowed=allowed) == "webhook_url_not_allowed"
