"""What ranks tell each other apart from the work: keys and texts in a store on rank 0, which nobody else can add to or change.

torch's store asks nobody who they are. So rank 0 makes a secret for each store and sends it over the process group; names of keys
are made from it, and every text is signed with it. A text without a right signature counts as none. The store listens on loopback
where all ranks are on one machine, otherwise on the address that the ranks met at.
"""

import hmac
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address

import torch.distributed as dist

from ..common.errors import ExportError

_DIGEST = 32  # bytes of a signature
_kept: list = []


class RankStore:
    """One rank's access. `share` gives every rank what rank 0 passes; making one is collective."""

    def __init__(self, rank: int, world: int, share: Callable[[object], object], timeout: float) -> None:
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        settings = {"timeout": timedelta(seconds=timeout), "wait_for_workers": False}
        server, place = _served(host, world, settings) if rank == 0 else (None, None)
        _kept[:] = [*_kept[-1:], server]  # others may still be talking to it when this rank has left
        place, self.secret = share((place, secrets.token_bytes(32)))
        if isinstance(place, str):
            raise ExportError(f"rank 0 cannot listen on {host}, so that ranks could miss one another: {place}")
        self.store = server or dist.TCPStore(*place, is_master=False, **settings)

    def set(self, key: str, text: str) -> None:
        """Every rank may read it."""
        self.store.set(self._name(key), self._signed(key, text.encode()))

    def get(self, key: str) -> str | None:
        """What a rank has set; None if none has."""
        return self.all([key])[0]

    def all(self, keys: Sequence[str]) -> list[str | None]:
        """The same of many keys. A key that is not there would hold whoever asks for it."""
        names = [self._name(key) for key in keys]
        if self.store.check(names):
            found = self.store.multi_get(names)
        else:
            found = [self.store.get(name) if self.store.check([name]) else b"" for name in names]
        return [self._text(key, value) for key, value in zip(keys, found, strict=True)]

    def _name(self, key: str) -> str:
        return hmac.digest(self.secret, f"name of {key}".encode(), "sha256").hex()

    def _signed(self, key: str, text: bytes) -> bytes:
        return hmac.digest(self.secret, f"{key}\n".encode() + text, "sha256") + text

    def _text(self, key: str, value: bytes) -> str | None:
        text = value[_DIGEST:]
        return text.decode() if hmac.compare_digest(value, self._signed(key, text)) else None


def _served(host: str, world: int, settings: dict) -> tuple[dist.TCPStore | None, tuple[str, int] | str]:
    """A store that all ranks can talk to, and where it listens, or why there is none."""
    found = listening(host, world)
    try:
        if found is None:
            store = dist.TCPStore(host, 0, is_master=True, **settings)
            return store, (host, store.port)
        address, port = found.getsockname()[:2]
        return dist.TCPStore(address, port, is_master=True, master_listen_fd=found.detach(), **settings), (
            address,
            port,
        )
    except RuntimeError as error:
        return None, str(error)


def listening(host: str, world: int) -> socket.socket | None:
    """A socket on the interface over which ranks reach this machine; None where no address of `host` is one of its own that others
    reach, as where a service stands before it: then the store listens on all interfaces.
    """
    host = "127.0.0.1" if os.environ.get("LOCAL_WORLD_SIZE") == f"{world}" else host
    with suppress(OSError):
        for family, *_, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            if ip_address(address[0].partition("%")[0]).is_loopback and host not in ("localhost", address[0]):
                continue  # a name of this machine, that means another address elsewhere
            one = socket.socket(family, socket.SOCK_STREAM)
            try:
                one.bind(address)
                return one
            except OSError:
                one.close()
    return None
