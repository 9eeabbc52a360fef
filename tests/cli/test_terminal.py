"""Plain lines for files and pipes; colours only for a terminal that has them and a person who has not declined."""

import sys

import pytest

from megatron_export.cli import terminal

PAIRS = [("format", "nvfp4"), ("problem", "model.norm.weight holds NaN [bold]"), ("left alone", "lm_head")]
PLAIN = "format            nvfp4\nproblem           model.norm.weight holds NaN [bold]\nleft alone        lm_head"


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal with colours."""
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_person_sees_colours_and_the_same_words(person: None) -> None:
    shown = terminal.rows(PAIRS, "exported")
    assert "\x1b[" in shown
    assert all(word in shown for pair in PAIRS for word in pair)
    assert "\x1b[" in (table := terminal.grid(("weight", "dB"), [["model.norm", "20.5"]], "worst"))
    assert "model.norm" in table


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_declines_gets_plain_lines(name: str, value: str, person: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert terminal.rows(PAIRS, "exported") == PLAIN


def test_a_file_gets_plain_lines() -> None:
    assert terminal.rows(PAIRS, "exported") == PLAIN
    table = terminal.grid(("weight", "dB"), [["model.norm", "20.5"], ["x", "3"]])
    assert table == "weight        dB\nmodel.norm  20.5\nx              3"


def test_the_progress_of_a_stage_is_one_line_in_a_file(capsys: pytest.CaptureFixture) -> None:
    assert list(terminal.bar("load", [1, 2, 3])) == [1, 2, 3]
    assert capsys.readouterr().err == "     load 3/3 00:00\n"
    assert list(terminal.bar("copied", [])) == []
    assert list(terminal.bar("parts", iter("ab"))) == ["a", "b"]
    assert capsys.readouterr().err == "    parts 2/2 00:00\n"


def test_a_long_stage_says_how_far_it_is(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    list(terminal.bar("score", range(4)))
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert lines[-1].startswith("    score 4/4 0")


def test_a_person_sees_a_bar_on_stderr_alone(person: None, capsys: pytest.CaptureFixture) -> None:
    assert list(terminal.bar("load", [1, 2])) == [1, 2]
    said = capsys.readouterr()
    assert said.out == ""
    assert "load" in said.err
    assert "2/2" in said.err
