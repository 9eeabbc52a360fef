"""Starts the processes that write an export in the background, connected to that of rank 0."""

import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

from ..distributed.collectives import together
from ..distributed.links import linked
from ..distributed.topology import Topology
from ..planning.contents import contents_of
from ..planning.plan import Plan
from ..writing.publish import Destination
from .async_writer import Handover


def start_writing(
    here: Topology, plan: Plan, place: Destination, files: dict[str, int] | None, mine: dict[str, Any]
) -> subprocess.Popen | None:
    """The process that writes the `files` (name -> descriptor) of this rank; None if they are None. `mine`: what rank 0 hands over
    besides. Collective; if it fails, no process is left.
    """
    links, process = linked(here, {0, *plan.writers.values()}), None
    try:
        with together(here, "start the process that writes"):
            if files is not None:
                process = _started(Handover(contents_of(plan), place, here.sizes, files, rank=here.rank, **mine), links)
    except BaseException:
        if process:
            process.kill()
            process.wait()
        raise
    return process


def _started(job: Handover, links: dict[int, socket.socket]) -> subprocess.Popen:
    """The process that writes; it has the memory's descriptors and the connections, and a session of its own, so that it outlives
    this one. What that of rank 0 says on standard error is what the handle raises; the others say it where this one does.
    """
    kept = os.memfd_create("job")  # no pipe: the process takes seconds before it reads
    job = replace(job, links={rank: link.fileno() for rank, link in links.items()})
    with os.fdopen(kept, "wb", closefd=False) as file:
        pickle.dump(job, file)
    locks = (job.claim.lock,) if job.claim else ()
    told = os.fdopen(os.memfd_create("told"), "rb") if job.claim else None  # no pipe, which fills while nobody reads
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_export.export.async_writer", f"{kept}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=told,
            pass_fds=(kept, *locks, *job.links.values(), *job.files.values()),
            start_new_session=True,
        )
        process.stderr = told
        return process
    finally:
        os.close(kept)
        for link in links.values():  # each end is in one process alone
            link.close()
