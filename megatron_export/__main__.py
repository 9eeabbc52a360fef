"""The commands that need no ranks: python -m megatron_export plan|check|verify|diff ..."""

from .cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main(print))
