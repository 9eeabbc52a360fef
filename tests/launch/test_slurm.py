"""launch/slurm.sh on a real cluster: bytes, logs, exit statuses, and what happens when the time is over."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ..export.test_topologies import export
from ..support.models import contents
from ..support.ranks import Ranks, living
from .cluster import ROOT, Cluster, Job, until

pytestmark = pytest.mark.whole

SCRIPT = ROOT / "launch" / "slurm.sh"
FLAGS = ("--device", "cpu", "--tp", 2, "--calib-samples", 2, "--calib-seq-len", 32, "--max-shard-size", "1MB")
END = """
import os, pathlib, signal, sys, time
rank, world = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
print("rank", rank, "of", world, *sys.argv[1:], flush=True)
pathlib.Path("rank-" + rank).touch()
while len(list(pathlib.Path().glob("rank-*"))) < world:
    time.sleep(0.05)
status = int(os.environ["STATUSES"].split()[int(rank)])
time.sleep(3600 if status == 99 else 0)
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""  # launch/export.py: once all ranks are there, each ends with its status of STATUSES, or waits if that is 99


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to submit from, with a `launch` of its own, and room for logs."""
    shutil.copytree(ROOT / "launch", tmp_path / "place" / "launch")
    return tmp_path / "place"


@pytest.fixture(scope="module")
def whole(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the command writes without SLURM."""
    output = tmp_path_factory.mktemp("local") / "out"
    export(living(pool), 2, *FLAGS, "--output", output)
    return contents(output)


def submit(cluster: Cluster, place: Path, *flags: object, options: tuple = (), **environment: object) -> str:
    """The number of a job on two nodes, of one rank each."""
    options = ("--parsable", "--nodes=2", "--gpus-per-node=2", "--output=said", *options)
    return cluster.told("sbatch", *options, SCRIPT, *flags, place=place, **{"RANKS_PER_NODE": 1} | environment)


def says(place: Path) -> str:
    """The output of the one job that was submitted there."""
    return (place / "said").read_text()


@pytest.mark.parametrize("task_per_rank", ["", "1"], ids=["torchrun", "task_per_rank"])
def test_two_nodes_write_the_bytes_of_a_local_run(
    task_per_rank: str, cluster: Cluster, whole: dict, place: Path
) -> None:
    number = submit(cluster, place, *FLAGS, "--output", place / "out", TASK_PER_RANK=task_per_rank)
    assert cluster.ended(number) == Job("COMPLETED", 0, 0), says(place)
    assert contents(place / "out") == whole
    assert f"folder            {place / 'out'}" in says(place).splitlines()
    assert [path.name for path in (place / f"export-{number}").iterdir()] == ["rank-1.log"]


def test_a_job_that_is_warned_of_its_time_limit_goes_back_into_the_queue_and_resumes(
    cluster: Cluster, whole: dict, place: Path
) -> None:
    shutil.copy(Path(__file__).with_name("held.py"), place / "launch" / "export.py")
    number = submit(cluster, place, *FLAGS, "--output", place / "out")
    until((place / "held").exists, "three files are complete")
    cluster.told("scancel", "--batch", "--signal=USR1", number)
    assert cluster.ended(number) == Job("COMPLETED", 0, 1), says(place)
    assert contents(place / "out") == whole
    assert "error: stopped by SIGUSR1: 3 of its files are complete" in says(place)
    assert "the job is queued again, restart 1 of at most 20" in says(place)
    assert "resumed           3 of" in says(place)


@pytest.mark.slow
def test_a_job_that_comes_to_its_time_limit_goes_back_into_the_queue_and_resumes(
    cluster: Cluster, whole: dict, place: Path
) -> None:
    shutil.copy(Path(__file__).with_name("held.py"), place / "launch" / "export.py")
    limit = ("--time=00:01:00", "--signal=B:USR1@15")
    number = submit(cluster, place, *FLAGS, "--output", place / "out", options=limit)
    until(lambda: cluster.job(number).restarts, "SLURM sent its signal")
    cluster.told("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    assert cluster.ended(number) == Job("COMPLETED", 0, 1), says(place)
    assert contents(place / "out") == whole
    assert "the job is queued again, restart 1 of at most 20" in says(place)


def test_a_refused_export_keeps_its_status_and_its_message(cluster: Cluster, place: Path) -> None:
    number = submit(cluster, place, "--device", "cpu", "--tp", 3, "--output", place / "out")
    assert cluster.ended(number) == Job("FAILED", 1, 0), says(place)
    assert says(place).count("error: world size 2 is not tp * pp * dp") == 1


def test_bad_usage_keeps_its_status_and_its_message(cluster: Cluster, place: Path) -> None:
    number = submit(cluster, place, "--tq", 2)
    assert cluster.ended(number) == Job("FAILED", 2, 0), says(place)
    assert says(place).count("error: unrecognized arguments: --tq 2") == 1


@pytest.mark.parametrize(
    ("statuses", "expected", "task_per_rank"),
    [
        ("75 75 75 75", 75, ""),
        ("1 -9 1 1", 1, ""),
        ("75 75 75 75", 75, "1"),
        ("1 -9 1 1", 1, "1"),
        ("2 2 2 2", 2, "1"),
        ("0 0 75 0", 75, "1"),
        ("0 0 0 3", 1, "1"),
    ],
    ids=lambda value: str(value).replace(" ", "_"),
)
def test_statuses_of_ranks_become_that_of_the_job(
    statuses: str, expected: int, task_per_rank: str, cluster: Cluster, place: Path
) -> None:
    (place / "launch" / "export.py").write_text(END)
    facts = {"STATUSES": statuses, "TASK_PER_RANK": task_per_rank, "MAX_RESTARTS": 0, "RANKS_PER_NODE": ""}
    number = submit(cluster, place, "one flag", **facts)
    assert cluster.ended(number) == Job("FAILED", expected, 0), says(place)
    assert "rank 0 of 4 one flag" in says(place)
    for rank in (1, 2, 3):
        assert (place / f"export-{number}" / f"rank-{rank}.log").read_text() == f"rank {rank} of 4 one flag\n"
        assert f"rank {rank} of" not in says(place)


def test_a_job_that_is_stopped_again_and_again_is_given_up(cluster: Cluster, place: Path) -> None:
    (place / "launch" / "export.py").write_text(END)
    number = submit(cluster, place, STATUSES="75 75", TASK_PER_RANK=1, MAX_RESTARTS=2)
    assert cluster.ended(number) == Job("FAILED", 75, 2), says(place)
    assert says(place).count("rank 0 of 2\n") == 1
    assert says(place).count("rank 0 of 2 --resume\n") == 2
    assert "not queued again after 2 restarts" in says(place)


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, place: Path) -> None:
    (place / "launch" / "export.py").write_text(END)
    number = submit(cluster, place, STATUSES="99 99")
    until(lambda: (place / "said").exists() and "rank 0" in says(place), "the ranks run")
    cluster.told("scancel", number)
    state, _, restarts = cluster.ended(number)
    assert (state, restarts) == ("CANCELLED", 0)
    assert "queued again" not in says(place)


INSIDE = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_SUBMIT_DIR": str(ROOT),
}


@pytest.mark.parametrize("empty", INSIDE)
def test_outside_of_a_job_the_script_says_what_is_empty(empty: str, tmp_path: Path) -> None:
    done = run_alone(tmp_path, **INSIDE | {empty: ""})
    assert done.returncode == 2
    assert f"error: {empty} is empty" in done.stderr and "sbatch launch/slurm.sh" in done.stderr


def test_nodes_without_names_and_a_wrong_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "scontrol").touch(mode=0o755)
    done = run_alone(tmp_path, **INSIDE)
    assert done.returncode == 2 and "scontrol names no host of SLURM_JOB_NODELIST=n[1-2]" in done.stderr
    done = run_alone(tmp_path, **INSIDE | {"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 2 and f"no launch/export.py in {tmp_path}" in done.stderr


def run_alone(programs: Path, **environment: str) -> subprocess.CompletedProcess:
    """The script as the shell runs it, with these programs before all others."""
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"} | environment
    return subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
