"""A SLURM cluster of two nodes on this machine: its own munge, key, ports and folder, nothing of the system's.

launch/slurm.sh makes a job's port from its number. So jobs are numbered from 9000 on: none of their ports is one of `free_port`'s.
"""

import getpass
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from ..support.ranks import WORKER, free_port

ROOT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("127.0.0.1", "127.0.0.2")  # names that are addresses, so that nothing needs to resolve them
CONFIG = """
ClusterName=export
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
KillWait=5
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={nodes[0]} NodeHostname={host} Port={ports[1]} CPUs=8 Gres=gpu:2
NodeName={nodes[1]} NodeHostname={host} Port={ports[2]} CPUs=8 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES State=UP
"""
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # slurmd wants devices; nothing here opens these
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Job(NamedTuple):
    """What SLURM says of a job: its state, the exit status of its script, how often it was started again."""

    state: str
    status: int
    restarts: int


class Cluster:
    """Use as a context: leaving it ends the daemons and every process of every job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.daemons: list[subprocess.Popen] = []
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment = outside | {
            "SLURM_CONF": str(self.config),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> "Cluster":
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        ports = [free_port() for _ in range(3)]
        self.config.write_text(
            CONFIG.format(
                host=host, user=user, folder=self.folder, nodes=NODES, ports=ports, first_job=9_000 + 300 * WORKER
            )
        )
        (self.folder / "gres.conf").write_text(GPUS)
        files = {name: self.folder / f"munge.{name}" for name in ("key", "socket", "pid", "seed")}
        files["key"].touch(mode=0o600)
        files["key"].write_bytes(secrets.token_bytes(64))
        names = {"key": "key-file", "socket": "socket", "pid": "pid-file", "seed": "seed-file"}
        try:
            self._start("munged", "--foreground", "--force", *(f"--{names[n]}={file}" for n, file in files.items()))
            until(files["socket"].exists, "munged listens", 20)
            self._start("slurmctld", "-D")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            until(self._idle, f"all nodes are idle; see {self.folder}/*.log", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        until(lambda: not [process.kill() for process in self._processes()], "all processes end", 20)
        for daemon in self.daemons:
            daemon.wait()

    def _start(self, daemon: str, *flags: str) -> None:
        """Start a daemon, which is killed when this process ends, however it ends."""
        with (self.folder / f"{daemon}-{Path(flags[-1]).name}.log").open("w") as log:
            command = ["setpriv", "--pdeathsig", "KILL", daemon, *flags]
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _idle(self) -> bool:
        told = subprocess.run(["sinfo", "-hN", "-o", "%T"], env=self.environment, capture_output=True, text=True)
        return told.stdout.split() == ["idle"] * len(NODES)

    def _processes(self) -> list[psutil.Process]:
        """What runs with this cluster's configuration: the daemons, the steps, the jobs."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("SLURM_CONF") == str(self.config)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # it ended meanwhile, or is another user's
                continue
        return found

    def told(self, *command: object, place: Path = ROOT, **environment: object) -> str:
        """What a SLURM command prints; a failure of it fails the test."""
        environment = self.environment | {name: str(value) for name, value in environment.items()}
        texts = [str(word) for word in command]
        done = subprocess.run(texts, env=environment, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, f"{texts}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> Job:
        """What SLURM says of it now."""
        words = self.told("scontrol", "--oneliner", "show", "job", number).split()
        told = dict(word.split("=", 1) for word in words if "=" in word)
        return Job(told["JobState"], int(told["ExitCode"].partition(":")[0]), int(told["Restarts"]))

    def ended(self, number: str, seconds: float = 240) -> Job:
        """The job when it is over. One that is to start again does so soon, not after SLURM's two minutes."""
        deadline, hastened = time.monotonic() + seconds, 0
        while (job := self.job(number)).state not in OVER:
            assert time.monotonic() < deadline, f"job {number} is still {job}"
            if job.state == "PENDING" and job.restarts > hastened:
                hastened = job.restarts  # nodes refuse a job in the second in which they ended it
                self.told("scontrol", "update", f"JobId={number}", "StartTime=now+3")
            time.sleep(0.3)
        return job


def until(done: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Wait until `done()`."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain until {what}"
        time.sleep(0.1)
