"""The command: torchrun --nproc-per-node N launch/export.py --tp N --hf-model PATH_OR_ID --format fp8 --output DIR."""

from megatron_export.common.garbage import no_garbage_collection
from megatron_export.distributed.signals import until_interrupted


def run() -> int:
    """The exit status."""
    with no_garbage_collection():
        from megatron_export.cli.export_command import main  # takes a second, in which Ctrl-C may come

    return main(print)


if __name__ == "__main__":
    raise SystemExit(until_interrupted(run))
