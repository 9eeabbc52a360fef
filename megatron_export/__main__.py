"""The command that needs no ranks: python -m megatron_export plan --hf-model PATH_OR_ID --tp N --format fp8."""

from megatron_export.cli import plan

if __name__ == "__main__":
    raise SystemExit(plan(print))
