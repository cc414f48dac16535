"""Addresses of this machine, which no proxy of the environment may see."""

import ipaddress
import os
import urllib.request
from functools import lru_cache
from urllib.parse import urlsplit

import psutil

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a host is the loopback interface, also as an IPv4 address within IPv6."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def takes_proxy(url: str) -> bool:
    """Whether a request may use the proxies of the environment (httpx's `trust_env`): not if it stays on this machine."""
    host = urlsplit(url).hostname or ""
    return not (is_loopback(host) or host in _own_addresses())


def bypass_proxies(*hosts: str) -> None:
    """Exclude this machine from the proxies of the environment, in this process and its children, for libraries' clients.

    Args:
        hosts: further hosts to exclude.
    """
    if not urllib.request.getproxies():
        return
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    known = [host.strip() for host in before.split(",") if host.strip()]
    if "*" in known:
        return
    wanted = dict.fromkeys([*known, *LOOPBACK, *_own_addresses(), *hosts])
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(wanted)


def in_url(host: str) -> str:
    """A host as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


@lru_cache(maxsize=1)
def _own_addresses() -> tuple[str, ...]:
    """The addresses of this machine's interfaces."""
    found = (address.address for interface in psutil.net_if_addrs().values() for address in interface)
    return tuple(sorted({address for address in found if _excludable(address)}))


def _excludable(address: str) -> bool:
    try:
        # Link-local addresses carry the name of their interface, which a list of exclusions cannot.
        return not ipaddress.ip_address(address.partition("%")[0]).is_link_local
    except ValueError:
        return False
