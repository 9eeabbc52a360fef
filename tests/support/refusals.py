"""What tests of bad input share: a command that must be refused, and ways to damage a model."""

import io
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..export.test_topologies import calibration_flags
from .models import read_json
from .ranks import Ranks, command

SECONDS = 20
DOWN = "model.layers.{}.mlp.down_proj.weight"


def import_everything() -> None:
    """So that the first test's seconds are not spent on the one import that ranks have not made."""
    import transformers  # noqa: F401


def command_during(fault: Callable[[], AbstractContextManager], *flags: object) -> tuple[int, str, str]:
    """In a rank: the command's status, what it said, and what else came on stderr, while `fault()` is open."""
    written = io.StringIO()
    with fault(), redirect_stderr(written):
        status, said = command(*flags)
    return status, said, written.getvalue()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`: the bytes of a file, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(
    ranks: Ranks,
    folder: Path,
    *flags: object,
    status: int = 1,
    fault: Callable[[], AbstractContextManager] = nullcontext,
) -> str:
    """Two ranks refuse `flags`, and leave all below `folder` as it was to the byte; returns what rank 0 said."""
    ranks.call(2, import_everything)
    before, started = contents(folder), time.monotonic()
    answers = ranks.call(2, command_during, fault, "--device", "cpu", *flags, seconds=SECONDS)
    (first, said, aside), (second, *silence) = answers
    assert time.monotonic() - started < SECONDS
    assert (first, second) == (status, status), said
    spoken, quiet = (said, silence[0]) if status == 1 else (aside, "".join(silence))
    assert spoken.count("error: ") == 1
    assert "Traceback" not in said + aside + "".join(silence)
    assert quiet == ""
    after = contents(folder)
    if "--resume" in spoken or "--load-calibration" in spoken:  # which go on with what is kept in hidden folders
        after = {path: held for path, held in after.items() if "/." not in f"/{path}" and held is not None}
        before = {path: held for path, held in before.items() if held is not None}
    assert after == before
    return spoken


def assert_says(said: str, *words: object) -> None:
    assert [word for word in map(str, words) if word not in said] == [], said


def fp8(source: Path, output: Path) -> tuple:
    return ("--tp", 2, "--hf-model", source, "--format", "fp8", "--output", output, *calibration_flags(source))


def occupy(folder: Path) -> None:
    """An older checkpoint."""
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"old weights")
    (folder / "deep" / "notes.txt").write_text("old notes")


def configured(**changes: Any) -> Callable[[Path], None]:
    """Change keys of config.json."""
    return lambda source: (source / "config.json").write_text(json.dumps(read_json(source / "config.json") | changes))


def rewritten(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors, as `change` does in place."""

    def rewrite(source: Path) -> None:
        held = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
        change(held)
        save_file(held, source / "model.safetensors")

    return rewrite
