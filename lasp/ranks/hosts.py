"""This host: its name among others, its addresses, and on which of them ranks listen."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path

LOOPBACK = "127.0.0.1"


def this_host() -> str:
    """Processes that get the same reach each other over the loopback interface.

    The host's name, since when it has been up (names alone may be the same on several), and, on Linux, the network
    namespace: containers of one machine have a loopback interface each.
    """
    boot, network = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/net"
    parts = [socket.gethostname(), boot.read_text().strip() if boot.exists() else ""]
    return " ".join([*parts, os.readlink(network) if os.path.lexists(network) else ""])


def is_loopback(address: str) -> bool:
    """Whether this is an address, or the name, of the loopback interface; names are not resolved."""
    literal = _literal(address)
    return address == "localhost" or (literal is not None and literal.is_loopback)


def listen(address: str, port: int) -> socket.socket:
    """Listen on this address only if it is a number and this host's own, otherwise on all addresses.

    A name may be another address to other hosts, and a number may be of a gateway that leads here.
    """
    literal = _literal(address)
    if literal is not None:
        family = socket.AF_INET if literal.version == 4 else socket.AF_INET6
        try:
            return socket.create_server((address, port), family=family, backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


def interfaces() -> list[tuple[str, str]]:
    """Names and addresses of the interfaces that other hosts may reach; on Linux, and empty elsewhere."""
    if sys.platform != "linux":
        return []
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:  # no address of IPv4
                continue
            found.append((name, socket.inet_ntoa(reply[20:24])))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        digits, *_, name = line.split()
        found.append((name, str(ipaddress.ip_address(bytes.fromhex(digits)))))
    return [(name, x) for name, x in found if not is_loopback(x) and not ipaddress.ip_address(x).is_link_local]


def choose_interfaces(hosts: list[str], addresses: list[str]) -> None:
    """Where gloo and NCCL shall listen, unless the variables for it are set.

    All ranks on one host: the loopback interface. On several hosts gloo takes the address that a host's name has; where
    that is a loopback address (Debian's /etc/hosts), the interface that has one of `addresses` shall be it.

    Args:
        hosts: of each rank, what `this_host` gives there.
        addresses: at which other hosts may reach this one, best first; those of other hosts do no harm.
    """
    if len(set(hosts)) == 1:
        bind_to_loopback()
    elif "GLOO_SOCKET_IFNAME" not in os.environ and not _own_name_is_reachable():
        names = [name for wanted in addresses for name, address in interfaces() if address == wanted]
        if names:
            os.environ["GLOO_SOCKET_IFNAME"] = names[0]


def bind_to_loopback() -> None:
    """All ranks are on this host: a laptop's changing network, or none, must not matter."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if names:
            os.environ.setdefault(variable, names[0])


def _own_name_is_reachable() -> bool:
    """Whether the address that gloo takes for this host's name, the first that is its own, is for others as well."""
    try:
        resolved = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return False
    for family, *_, where in resolved:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(where)
            except OSError:
                continue
            return not is_loopback(str(where[0]))
    return False


def _literal(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None
