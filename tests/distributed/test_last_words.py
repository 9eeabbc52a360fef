"""How a rank ends: the exit status, and what it leaves in the file that torchrun names, for torchrun to show."""

import json
import os
from pathlib import Path

import pytest

from megatron_export.cli import export_command
from megatron_export.cli.config import ExportConfig
from megatron_export.common.errors import ExportError, Interrupted, RankLost
from megatron_export.distributed import heartbeat, last_words

GONE = "rank 0 is gone: silent for 5 s. It was at: encode"
STARTED = 5  # seconds since 1970: when this process began, so that its message counts as the first


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The error file of rank 1."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(last_words, "_STARTED", STARTED)
    return tmp_path / "error.json"


def told(left: Path) -> tuple[str, bool]:
    """The message, and whether torchrun takes it for the first."""
    message = json.loads(left.read_text())["message"]
    return message["message"], int(message["extraInfo"]["timestamp"]) == STARTED


@pytest.mark.parametrize(
    ("error", "status", "blamed"),
    [
        (RankLost(GONE), 1, True),
        (ExportError("no room"), 1, False),
        (Interrupted("stopped by SIGTERM"), 75, False),
        (Interrupted("stopped by SIGUSR1"), 75, False),
        (Interrupted("stopped by SIGINT"), 130, False),
    ],
    ids=str,
)
def test_an_export_that_ends_early_leaves_its_message_and_a_status(
    error: ExportError, status: int, blamed: bool, left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_command, "let_rank_0_speak", lambda: None)
    assert export_command._failed(lambda *words, **_: None, ExportConfig(dry_run=True), error) == status
    message, first = told(left)
    assert (message.startswith(f"error: {error}"), first) == (True, blamed)


def test_a_rank_that_a_collective_holds_leaves_the_verdict_alone(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No exception reaches it: its heartbeat ends the process."""
    pulse, statuses = heartbeat.Pulse(1, 1, lambda value: value, timeout=1), []
    monkeypatch.setattr(heartbeat, "GRACE", -1)
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(os, "write", lambda file, line: None)
    pulse._leave(GONE)
    assert (told(left), statuses) == ((f"error: {GONE}", True), [1])
