"""Experts that an original stacks in one tensor [experts, in, out], as they are to be written: stacked still, or one by one."""

import torch
from torch import Tensor

from megatron_export.common.piece import Amax
from megatron_export.formats import chosen, encode

from .models import same

ONE = torch.ones(())


def assert_stacked(found: dict[str, Tensor], original: Tensor, form: str) -> None:
    """Each expert's codes and scales, transposed, under the amax of all; `found` is by what follows in the stack's name."""
    for expert, weight in enumerate(original):
        pieces = encode(chosen(form), weight.T.contiguous(), Amax(original.abs().max().float(), ONE))
        for suffix in pieces.keys() - {"input_scale"}:
            stack = found["" if suffix == "weight" else f"_{suffix}"]
            assert same(stack[expert].T.contiguous() if stack.dim() else stack, pieces[suffix].data), suffix


def assert_single(found: dict[str, Tensor], prefix: str, original: Tensor, form: str) -> None:
    """Each expert's gate and up, under their own amax."""
    for expert, weight in enumerate(original):
        for part, rows in zip(("gate", "up"), weight.T.chunk(2), strict=True):
            pieces = encode(chosen(form), rows.contiguous(), Amax(weight.abs().max().float(), ONE))
            for suffix in pieces.keys() - {"input_scale"}:
                assert same(found[f"{prefix}{expert}.{part}_proj.{suffix}"], pieces[suffix].data), suffix
