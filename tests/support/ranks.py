"""A pool of processes that play the ranks of a `torchrun`: they import once, and every call is a new little world."""

import gc
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.tensor import _redistribute, debug

from megatron_export.cli import export_command, flags
from megatron_export.common.optional import part

from .command_line import said_by

# Megatron-Core comes in through the package, as in an export: what it has compiled is compiled on a GPU alone.
parallel_state = part("mcore.parallel_state").parallel_state
# A rank is a fork of a process that has imported this file, and so what an export imports on its way.
for late in (
    *("cli.run", "cli.plan_command", "calibration.calibrate"),
    *("cli.megatron_model", "calibration.mcore.subject", "export.megatron_model"),
):
    import_module(f"megatron_export.{late}")
for late in ("rich.console", "rich.progress", "numpy.ctypeslib", "safetensors.torch"):
    import_module(late)
ROTARY = [
    getattr(import_module(f"megatron.core.models.common.embeddings.{file}"), name)
    for file, name in (
        ("rotary_pos_embedding", "RotaryEmbedding"),
        ("yarn_rotary_pos_embedding", "YarnRotaryEmbedding"),
    )
]
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 3  # which of pytest's processes
_tried = count(os.getpid() * 61)  # two runs on one machine do not try the same ones


def free_port() -> int:
    """A port that nobody listens on, from 20000 to 28999, and in a range of this test process's own.

    It lies below the ports that the system gives to clients. Those from 29000 on are the SLURM jobs' of tests/launch/cluster.py.
    """
    while True:
        port = 20_000 + 3_000 * WORKER + next(_tried) % 3_000
        with socket.socket() as one, suppress(OSError):
            one.bind(("localhost", port))
            return port


class RankFailed(AssertionError):
    """A rank raised something, or said nothing within the time."""


class Ranks:
    """`size` processes on this machine; `call` runs a function on the first `world` of them, as a torchrun would."""

    def __init__(self, size: int) -> None:
        self.workers = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            self.workers.append((process, ours))

    def call(self, world: int, function: Callable, *args: Any, seconds: float = 120, **kwargs: Any) -> list[Any]:
        """What `function(*args, **kwargs)` returned on every rank, in rank order."""
        assert all(process.is_alive() for process, _ in self.workers), "a rank of an earlier test hangs or died"
        port = free_port()
        for _, pipe in self.workers[:world]:
            pipe.send((world, port, function, args, kwargs))
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:world])}
        deadline = time.monotonic() + seconds
        while waiting and time.monotonic() < deadline:
            for pipe in wait(list(waiting), timeout=1):
                failed, result = pipe.recv()
                rank = waiting.pop(pipe)
                results[rank] = RankFailed(f"rank {rank}: {result}") if failed else result
                if failed:  # the others may wait for it in a collective: they get a moment to end too
                    deadline = min(deadline, time.monotonic() + 10)
        if waiting:
            self.close()
        if failures := [result for _, result in sorted(results.items()) if isinstance(result, RankFailed)]:
            raise failures[0]
        if waiting:
            raise RankFailed(f"ranks {sorted(waiting.values())} said nothing for {seconds} s")
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process, _ in self.workers:
            process.kill()


def living(pool: list[Ranks]) -> Ranks:
    """The four ranks of a pool; new ones if there are none, or one of them hangs or is dead."""
    if not pool or not all(process.is_alive() for process, _ in pool[0].workers):
        pool[:] = [Ranks(4)]
    return pool[0]


def as_rank(rank: int, world: int, port: int) -> None:
    """Make this process a rank as torchrun would, but for torchrun itself, which would end rank 0 early."""
    torch.set_num_threads(1)
    export_command.let_rank_0_speak = flags.let_rank_0_speak = lambda: None
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def _serve(pipe: Connection, rank: int) -> None:
    gc.freeze()  # what was imported is not looked through after every call
    gc.disable()  # nor what a call makes before its end: that took 7 % of the CPU time of all tests
    while True:
        world, port, function, args, kwargs = pipe.recv()
        as_rank(rank, world, port)
        try:
            answer = (False, function(*args, **kwargs))
            pickle.dumps(answer)
        except BaseException:  # noqa: BLE001 - whatever a rank did wrong is the test's to judge
            answer = (True, traceback.format_exc())
            with suppress(Exception):  # the next test starts groups of its own
                parallel_state.destroy_model_parallel()
                torch.distributed.destroy_process_group()
        _forget_world()
        pipe.send(answer)


def _forget_world() -> None:
    """Let go of what holds groups of a world that has ended: each has a thread of gloo's, which wakes a hundred times a second.

    Megatron-Core caches what its rotary embeddings gave, and with it up to 32 of them, and leaves some groups in its globals.
    DTensor caches how tensors go from one placement to another, and with it their mesh.
    """
    for kind in ROTARY:
        kind.forward.cache_clear()
    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    if "clear_redistribute_planner_cache" in vars(_redistribute):  # of torch 2.10 or later
        _redistribute.clear_redistribute_planner_cache()
    for name, value in vars(parallel_state).items():
        if isinstance(value, ProcessGroup):
            setattr(parallel_state, name, None)
    gc.collect()


def command(*flags: object) -> tuple[int, str]:
    """Run the command in this rank with `flags`; returns its exit status and all it said."""
    return said_by(export_command.main, *flags)
