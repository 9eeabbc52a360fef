"""`python -m megatron_export`, and the console script `megatron-export`."""

from .common.garbage import no_garbage_collection
from .common.later import import_later
from .distributed.signals import until_interrupted


def script() -> int:
    """What the console script calls."""
    return until_interrupted(_run)


def _run() -> int:
    import_later("torch", "numpy")
    with no_garbage_collection():
        from .cli.commands import main  # takes a while, in which Ctrl-C may come

    return main(print)


if __name__ == "__main__":
    raise SystemExit(script())
