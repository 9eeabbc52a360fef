"""The store through which ranks watch each other: strangers can neither say anything in it nor reach it from other machines."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_export.distributed import rank_store
from megatron_export.distributed.collectives import together
from megatron_export.distributed.rank_store import RankStore
from megatron_export.mcore import parallel_state

from ..support.ranks import Ranks

SECRET = b"s" * 32


def listening_at(port: int) -> list[str]:
    """The addresses, as the kernel spells them, on which this machine listens at a port."""
    lines = [
        line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    return [line[1].partition(":")[0] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]


def attacked() -> tuple[str, list[str]]:
    """In a rank: the verdict after a stranger has said that a rank failed, under every key there is; where the store listens."""
    with parallel_state.started(1, 1, "cpu"), parallel_state.current(2) as here:
        store = getattr(here.pulse.store, "store", here.pulse.store)
        if here.first:
            stranger = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
            for key in ("verdict", "alarm", *stranger.list_keys()):
                stranger.set(key.removeprefix("/"), "rank 1 failed to export: bye")
        with together(here, "listen"):
            time.sleep(1.2)  # three beats
        return here.pulse.verdict, listening_at(store.port)


def test_nobody_else_ends_a_job_or_reaches_its_store(ranks: Ranks) -> None:
    assert ranks.call(2, attacked) == [("", ["0100007F"])] * 2  # 127.0.0.1


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RankStore, RankStore, dist.TCPStore]]:
    """Two ranks' stores, and a stranger's."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = []
    first = RankStore(0, 2, lambda mine: said.append(mine) or mine, 30)
    second = RankStore(1, 2, lambda mine: said[0], 30)
    yield first, second, dist.TCPStore(*said[0][0], is_master=False, wait_for_workers=False)
    rank_store._kept.clear()


def test_ranks_read_what_ranks_say(pair: tuple) -> None:
    first, second, _ = pair
    assert first.get("1") is None
    second.set("1", "7 export, at ±")
    assert first.get("1") == "7 export, at ±"
    assert first.all(["0", "1", "2"]) == [None, "7 export, at ±", None]
    first.set("0", "")
    assert second.all(["0", "1"]) == ["", "7 export, at ±"]


def test_what_is_not_signed_with_the_secret_was_not_said(pair: tuple) -> None:
    first, second, stranger = pair
    second.set("1", "7 export")
    name = first._name("1")
    signed = stranger.get(name)
    for value in (b"", b"7 export", signed[:-1], signed + b"!", b"x" * 32 + b"7 export"):
        stranger.set(name, value)
        assert first.get("1") is None
    stranger.set(name, signed)
    assert first.get("1") == "7 export"
    stranger.set(first._name("verdict"), signed)  # another key's
    assert first.get("verdict") is None
    stranger.set("verdict", signed)
    assert first.get("verdict") is None


@pytest.mark.parametrize(
    ("host", "address", "found"),
    [
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("node0", "127.0.1.1", None),  # Debian's name of the machine itself: others know another address
        ("service", "192.0.2.1", None),  # of no interface here
        ("nobody", None, None),
    ],
)
def test_the_interface_is_that_of_the_rendezvous(
    host: str, address: str | None, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def resolved(name: str, *more: object, **settings: object) -> list:
        if address is None:
            raise socket.gaierror("unknown")
        return real(address, *more, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    listening = rank_store.listening(host, 8)
    assert (listening and listening.getsockname()[0]) == found
    if listening:
        listening.close()


def test_a_store_without_an_interface_of_its_own_listens_and_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_store, "listening", lambda host, world: None)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    said = []
    first = RankStore(0, 2, lambda mine: said.append(mine) or mine, 30)
    RankStore(1, 2, lambda mine: said[0], 30).set("1", "here")
    assert first.get("1") == "here"
    rank_store._kept.clear()
