"""These tests are collected where there is a GPU; the rest of the suite needs none."""

import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
