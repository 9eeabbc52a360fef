"""A connection from each of some ranks to rank 0, for processes that these ranks start: whoever ends, the other end hears of it."""

import hmac
import os
import secrets
import socket
from collections.abc import Collection
from contextlib import suppress

from ..common.errors import ExportError
from . import collectives
from .collectives import together
from .rank_store import listening
from .topology import Topology

_WAIT = 60.0  # seconds for a connection between two ranks that are there
_SECRET = 32  # bytes
_LOST = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # after 30 s, a host that is gone counts as such


def linked(here: Topology, ranks: Collection[int]) -> dict[int, socket.socket]:
    """On rank 0, the connections from the other `ranks`, by rank; on these, the one to rank 0, by 0; {} elsewhere. Collective."""
    others = sorted(set(ranks) - {0})
    if not others:
        return {}
    server, place = None, None
    with together(here, "connect the processes that write"):
        if here.first:
            host = os.environ.get("MASTER_ADDR") or socket.gethostname()
            server = listening(host, here.world) or socket.create_server(("", 0))
            server.listen(len(others))
            address = server.getsockname()[0]
            place = host if address in ("0.0.0.0", "::") else address, server.getsockname()[1]  # noqa: S104
    place, secret = collectives.from_first(here, (place, secrets.token_bytes(_SECRET)))
    links: dict[int, socket.socket] = {}
    try:
        with together(here, "connect the processes that write"):
            if here.first:
                links = _accepted(server, secret, others)
            elif here.rank in others:
                links = {0: socket.create_connection(place, timeout=_WAIT)}
                links[0].sendall(secret + here.rank.to_bytes(4, "big"))
            for link in links.values():
                _watched(link)
    except BaseException:
        for link in links.values():
            link.close()
        raise
    finally:
        if server:
            server.close()
    return links


def _accepted(server: socket.socket, secret: bytes, ranks: list[int]) -> dict[int, socket.socket]:
    """The connections of these ranks; those of others are closed."""
    links: dict[int, socket.socket] = {}
    server.settimeout(_WAIT)
    while lacking := [rank for rank in ranks if rank not in links]:
        try:
            link, _ = server.accept()
        except TimeoutError:
            raise ExportError(f"ranks {lacking} did not connect to rank 0 within {_WAIT:.0f} s") from None
        link.settimeout(_WAIT)
        said = b""
        with suppress(OSError):
            said = link.recv(_SECRET + 4, socket.MSG_WAITALL)
        rank = int.from_bytes(said[_SECRET:], "big")
        if hmac.compare_digest(said[:_SECRET], secret) and rank in lacking:
            links[rank] = link
        else:
            link.close()
    return links


def _watched(link: socket.socket) -> None:
    """Waits as long as it takes, but for a host that is gone."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _LOST.items():
        link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
