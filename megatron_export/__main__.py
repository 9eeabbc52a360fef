"""`python -m megatron_export`, and the console script `megatron-export`."""

from .distributed.signals import until_interrupted


def script() -> int:
    """What the console script calls."""
    return until_interrupted(_run)


def _run() -> int:
    from .cli.commands import main  # takes seconds, in which Ctrl-C may come

    return main(print)


if __name__ == "__main__":
    raise SystemExit(script())
