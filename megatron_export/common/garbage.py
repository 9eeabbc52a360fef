"""Python's garbage collector, kept from walking again and again through many objects that all stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Where millions of objects are made that all stay, as in a large plan or an import of torch: up to half of the time would go
    into looking for cycles among them.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
