"""The subcommands of launch/benchmark.py, a file each, and what several of them need."""
