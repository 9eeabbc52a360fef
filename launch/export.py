"""The command: torchrun --nproc-per-node N launch/export.py --tp N --hf-model PATH_OR_ID --format fp8 --output DIR."""

from megatron_export.cli.export_command import main

if __name__ == "__main__":
    raise SystemExit(main(print))
