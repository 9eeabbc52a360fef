"""The cluster that the jobs run on; without SLURM's programs these tests say why they do not run."""

import os
import shutil
from collections.abc import Iterator

import pytest

from .cluster import DAEMONS, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := [name for name in DAEMONS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]:
        pytest.skip(f"no {', '.join(missing)} here: as root, apt-get install slurm-wlm munge")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
