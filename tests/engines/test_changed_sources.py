"""The report of what changed in the sources that rules cite, on sources made here."""

import re
import zipfile
from pathlib import Path

from .changed_sources import changed, report

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


def test_the_rules_of_a_changed_file_are_named(tmp_path: Path) -> None:
    file = "sglang/srt/layers/quantization/modelopt_quant.py"
    with zipfile.ZipFile(tmp_path / "old.whl", "w") as wheel:
        wheel.writestr(file, OLD)
    (tmp_path / "new" / file).parent.mkdir(parents=True)
    (tmp_path / "new" / file).write_text(NEW)
    lines = report("sglang", tmp_path / "old.whl", tmp_path / "new")
    [at] = [n for n, line in enumerate(lines) if line.startswith("srt/layers/quantization/modelopt_quant.py: ")]
    assert "algorithm" in lines[at] and "kv pair" not in lines[at]
    assert lines[at + 1 : at + 4] == ["    Config.read", "    - Config.gone", "    + Config.added"]
    assert re.fullmatch(r"0 of \d+ files that rules cite did not change", lines[-1])
