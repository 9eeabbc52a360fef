"""A module that is imported later is imported once, whole, with the first thing that is asked of it."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest

from megatron_export.common.later import import_later, import_now

SLOW = """
import sys, time
sys.begun = getattr(sys, "begun", 0) + 1
first = 1
time.sleep(0.05)
import slow_to_import.part
assert slow_to_import.first == 1
last = 2
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "slow_to_import"
    folder.mkdir()
    (folder / "__init__.py").write_text(SLOW)
    (folder / "part.py").write_text("import slow_to_import\nfound = slow_to_import.first\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "begun", 0, raising=False)
    yield folder
    for name in ("slow_to_import", "slow_to_import.part"):
        sys.modules.pop(name, None)


def test_it_is_imported_with_its_first_attribute(package: Path) -> None:
    import_later("slow_to_import")
    module = import_module("slow_to_import")
    assert sys.begun == 0
    assert (module.last, sys.begun) == (2, 1)
    assert import_module("slow_to_import") is module
    assert type(module) is type(sys)
    import_later("slow_to_import")
    assert (import_module("slow_to_import").first, sys.begun) == (1, 1)


def test_a_part_of_it_brings_all_of_it(package: Path) -> None:
    import_later("slow_to_import")
    assert import_module("slow_to_import.part").found == 1
    assert sys.begun == 1


def test_it_is_imported_when_that_is_asked_for(package: Path) -> None:
    import_later("slow_to_import")
    import_now("slow_to_import")
    assert sys.begun == 1


def test_threads_wait_until_all_of_it_is_there(package: Path) -> None:
    import_later("slow_to_import")
    module = import_module("slow_to_import")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: module.last, range(8))) == {2}
    assert sys.begun == 1


def test_what_it_has_not_is_missed(package: Path) -> None:
    import_later("slow_to_import")
    with pytest.raises(AttributeError, match="slow_to_import.*nothing"):
        _ = import_module("slow_to_import").nothing
    assert sys.begun == 1


def test_an_import_that_fails_says_why_and_may_be_tried_again(package: Path) -> None:
    (package / "__init__.py").write_text("raise OSError('no library')")
    import_later("slow_to_import")
    with pytest.raises(OSError, match="no library"):
        _ = import_module("slow_to_import").last
    assert "slow_to_import" not in sys.modules


def test_what_is_not_installed_is_missed_where_it_is_imported() -> None:
    import_later("not_installed_anywhere")
    with pytest.raises(ModuleNotFoundError):
        import_module("not_installed_anywhere")
