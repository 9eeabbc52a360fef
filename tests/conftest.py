"""Fixtures shared by all tests: the ranks, one small checkpoint per architecture, and one to damage."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from .support.models import ARCHITECTURES, make_model
from .support.ranks import Ranks, living

NOT_WHOLE = "not whole and "
LOWEST_FIRST = ("common", "formats", "models", "planning", "engines", "distributed")  # what fails there fails above too
LONGEST_FIRST = (  # where several processes share the files: one of these that began last would run on when all others are done
    *("launch/test_slurm", "formats/test_kernels", "export/test_formats_on_topologies", "export/test_faults"),
    *("cli/test_plan_command", "calibration/test_experts", "launch/test_benchmark_speed", "models/test_families"),
    *("calibration/test_memory", "mcore/test_live_model", "export/test_training", "models/test_linear_attention"),
    *("cli/test_torchrun", "hf/test_sharded", "export/test_streams", "mcore/test_quantized_parameters"),
    *("models/test_full_size", "cli/test_closed_pipe", "launch/test_benchmark_quality", "hf/test_routes"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run the tests marked `whole` too, as CI does")


def pytest_configure(config: pytest.Config) -> None:
    """Tests that were chosen by path or by name run, `whole` or not."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    if config.option.whole or named:
        config.option.markexpr = config.option.markexpr.removeprefix(NOT_WHOLE)
    if "loadscopereorder" in config.option:  # pytest-xdist would have the files with most tests first
        config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays, and is not looked through again and again


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries say at the end that it leaked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the lowest rooms come first: with -x, a mistake is seen where it is. Of several processes, the longest files."""
    order = {room: number for number, room in enumerate(LOWEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))
    if "PYTEST_XDIST_WORKER" in os.environ:
        longest = {name: number for number, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: longest.get(f"{item.path.parent.name}/{item.path.stem}", len(longest)))


@pytest.fixture(scope="session")
def pool() -> Iterator[list[Ranks]]:
    """The one pool of ranks that is alive, in a list, so that a test that broke it can put a new one there."""
    alive: list[Ranks] = []
    yield alive
    for ranks in alive:
        ranks.close()


@pytest.fixture
def ranks(pool: list[Ranks]) -> Ranks:
    """Four ranks; new ones if an earlier test left one hanging or dead."""
    return living(pool)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder of a small checkpoint; the token ids to calibrate with are in ../ids/calibration.safetensors."""
    return {name: make_model(tmp_path_factory.mktemp("models"), name) for name in ARCHITECTURES}


@pytest.fixture
def source(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model of the test's own, to damage; its calibration data is beside it."""
    shutil.copytree(models["llama31"].parent, tmp_path / "models")
    return tmp_path / "models" / "llama31"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder that does not exist, in one that is empty."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Prints a line at the end of the run, in whatever process the test runs."""
    return partial(record_property, "told")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for line in (text for name, text in report.user_properties if name == "told"):
                    terminalreporter.write_line(line)
