"""The commands that need no ranks: python -m megatron_export plan --hf-model PATH_OR_ID --tp N, or check DIR."""

import sys

from megatron_export.commands import run

if __name__ == "__main__":
    raise SystemExit(run(print, sys.argv[1:]))
