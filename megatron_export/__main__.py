"""`python -m megatron_export`, and the console script `megatron-export`."""

from .cli.commands import main


def script() -> int:
    """What the console script calls."""
    return main(print)


if __name__ == "__main__":
    raise SystemExit(script())
