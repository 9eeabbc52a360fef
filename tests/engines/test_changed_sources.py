"""The report of what changed in the sources that rules cite, on sources made here."""

import re
import zipfile
from pathlib import Path

import pytest

from .changed_sources import changed, main, report

OLD = '''"""A module."""
LIMIT = 1
class Config(Base):
    def read(self, said):
        """Read it."""
        return said["quant_algo"]  # a comment
    def gone(self): pass
'''
NEW = '''"""Another docstring."""
LIMIT = 1
class Config(Base):
    def read(self, said):
        return said.get("quant_algo")
    def added(self): pass
'''


def test_code_is_compared_and_not_text() -> None:
    assert changed(OLD, OLD.replace("  # a comment", "").replace("Read it", "It is read")) == []
    assert changed(OLD, NEW) == ["Config.read", "- Config.gone", "+ Config.added"]
    assert changed(OLD, OLD.replace("LIMIT = 1", "LIMIT = 2")) == ["(statements)"]
    assert changed(OLD, OLD.replace("(Base)", "(Other)")) == ["Config"]
    assert (changed(None, NEW), changed(OLD, None), changed(None, None)) == (
        ["+ (the file)"],
        ["- (the file)"],
        ["(the file)"],
    )


FILE = "sglang/srt/layers/quantization/modelopt_quant.py"
LLAMA = "sglang/srt/models/llama.py"


def wheel_of(path: Path, **texts: str) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in ((FILE, texts["modelopt"]), (LLAMA, texts["llama"])):
            wheel.writestr(file, text)
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A wheel, and a folder with another release."""
    old = wheel_of(tmp_path / "old.whl", modelopt=OLD, llama="class Llama(Base): LAYERS = 1")
    for file, text in ((FILE, NEW), (LLAMA, "class LlamaForCausalLM(Base): LAYERS = 2")):
        (tmp_path / "new" / file).parent.mkdir(parents=True)
        (tmp_path / "new" / file).write_text(text)
    return old, tmp_path / "new"


def test_the_rules_of_a_changed_file_are_named(two: tuple[Path, Path]) -> None:
    lines, count = report("sglang", *two)
    at = lines.index(FILE)
    assert "algorithm" in lines[at + 1] and "algorithm of drafts" in lines[at + 1] and "kv pair" not in lines[at + 1]
    assert lines[at + 2 : at + 5] == ["        Config.read", "        - Config.gone", "        + Config.added"]
    assert re.fullmatch(rf"{count} of \d+ files changed", lines[-3])
    assert re.search(r"asks the new release: .*\bscale\b", lines[-2]) and re.search(
        r"no test asks: .*\bawq\b", lines[-1]
    )


def test_an_architecture_is_named_where_its_class_is(two: tuple[Path, Path]) -> None:
    lines, _ = report("sglang", *two)
    assert lines[lines.index(LLAMA) + 1].endswith(", LlamaForCausalLM")
    assert "Phi3ForCausalLM" not in "".join(lines)


def test_the_exit_status_says_whether_anything_is_to_be_looked_at(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = map(str, two)
    monkeypatch.setattr("tests.engines.changed_sources.resting", lambda *asked: {FILE: [("algorithm", True)]})
    assert (main(["sglang", old, old]), main(["sglang", old, new])) == (0, 1)
    (tmp_path / "text.whl").write_text("no archive")
    for wrong in (str(tmp_path), str(tmp_path / "text.whl"), "absent.whl"):
        with pytest.raises(SystemExit) as left:
            main(["sglang", old, wrong])
        assert left.value.code == 2 and wrong in capsys.readouterr().err
