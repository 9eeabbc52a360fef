"""What is refused of calibration data, whatever the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.errors import ExportError

LATENT = (
    "experts that read a latent share no input with the shared experts beside them, so AWQ cannot smooth both by one vector. "
    "Calibrate for a format without AWQ"
)
QUANTIZED = (
    "ModelOpt quantizes this model, so its inputs are not those of the bfloat16 one. Export it without calibration: the "
    "quantizers' own statistics are used; or disable them"
)


def check_batches(batches: Sequence[Tensor], vocab: int) -> None:
    """`ExportError` unless there are batches, each int64 or int32 [batch, tokens], of ids below `vocab`."""
    if not batches:
        raise ExportError("the calibration data holds no batch")
    for number, batch in enumerate(batches):
        if batch.dim() != 2 or batch.numel() == 0 or batch.dtype not in (torch.int64, torch.int32):
            kind = f"{batch.dtype} {tuple(batch.shape)}"
            raise ExportError(f"calibration batch {number} is {kind}, not integer [batch, tokens]")
        if batch.min() < 0 or batch.max() >= vocab:
            raise ExportError(
                f"calibration batch {number} holds token ids {int(batch.min())} to {int(batch.max())}, outside the "
                f"model's vocabulary of {vocab}: was it tokenized for another model?"
            )
