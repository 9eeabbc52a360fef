"""How progress is shown: a function that is given a stage's name and its steps, and passes the steps on."""

from collections.abc import Callable, Iterable

Progress = Callable[[str, Iterable], Iterable]


def quiet(stage: str, steps: Iterable) -> Iterable:
    """Shows nothing."""
    return steps
