"""Functions that Megatron-Core has torch compile where it is imported, compiled where they are first called instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """Import in it: `torch.compile` imports torch's compilers, which takes more than a second, and most exports call no function
    that is compiled. Without CUDA none is compiled: that would take a C++ compiler, and seconds for each function.
    """
    with mock.patch.object(torch, "compile", _when_called(torch.compile)):
        yield


def _when_called(compiler: Callable) -> Callable:
    def decorate(function: Callable | None = None, **options: Any) -> Callable:
        if function is None:
            return lambda later: decorate(later, **options)
        made: list[Callable] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not made:
                made.append(compiler(function, **options) if torch.cuda.is_available() else function)
            return made[0](*args, **kwargs)

        return call

    return decorate
