"""One node of launch/slurm.sh: torchrun, but with the exit status of the rank that failed first, where torchrun has 1."""

import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from megatron_export.distributed.signals import HEEDED, status_of


def run(flags: list[str]) -> int:
    """Start this node's ranks and wait for them; returns the status that srun is to see."""
    places = {
        "nnodes": os.environ["SLURM_NNODES"],
        "node-rank": os.environ["SLURM_NODEID"],
        "nproc-per-node": os.environ["RANKS_PER_NODE"],
        "master-addr": os.environ["MASTER_ADDR"],
        "master-port": os.environ["MASTER_PORT"],
        "signals-to-handle": ",".join(number.name for number in HEEDED),
    }
    options = [f"--{name}={value}" for name, value in places.items()]
    try:
        main([*options, "--no-python", "bash", "launch/slurm_rank.sh", *flags])
    except SignalException as stopped:  # which torchrun has passed on, and waited until its ranks were gone
        return status_of(stopped.sigval.name)
    except ChildFailedError as error:
        _, first = error.get_first_failure()  # torchrun itself ended those that failed after it
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
