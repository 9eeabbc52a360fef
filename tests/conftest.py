"""Fixtures shared by all tests: the ranks, and one small checkpoint per architecture."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from .models import ARCHITECTURES, make_model
from .ranks import Ranks, living


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
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Prints a line at the end of the run, in whatever process the test runs."""
    return partial(record_property, "told")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for line in (text for name, text in report.user_properties if name == "told"):
                    terminalreporter.write_line(line)
