"""The command as torchrun starts it, on a rank that waits in the middle of an export until it is told to stop.

In the folder that WAITING names it leaves its process id when it waits, and its exit status when it ends.
"""

import os
import time
from pathlib import Path

from megatron_export.cli import export_command
from megatron_export.distributed import signals

from . import faults


def wait(note: Path) -> None:
    """Until a signal comes, or half a minute."""
    note.write_text(f"{os.getpid()}")
    started = time.monotonic()
    while not signals.asked_to_stop() and time.monotonic() < started + 30:
        time.sleep(0.02)


if __name__ == "__main__":
    rank, folder = os.environ["RANK"], Path(os.environ["WAITING"])
    faults.in_small_steps()
    fault = faults.Fault("wait", "last bucket", (int(rank),), (wait, folder / f"{rank}.waits"))
    with faults.armed(fault, int(rank)):
        status = export_command.main(print)
    (folder / f"{rank}.status").write_text(f"{status}")
    raise SystemExit(status)
