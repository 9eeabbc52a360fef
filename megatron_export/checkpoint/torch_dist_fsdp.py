"""What Megatron saves without dist_checkpointing, as plain torch.distributed.checkpoint: `fsdp_dtensor` of Megatron-FSDP, and
`torch_dcp`.

Keys are `model.`, the wrappers' `module.`s, and the name of a parameter, of any layer spec, with an axis neither for layers nor for
experts; `args` is the object with Megatron-LM's arguments. Numbers of layers are those of a pipeline stage, so such a checkpoint is
whole at PP 1 only; numbers of experts are global. Tensors are whole, however DTensors were cut, but a linear of several segments
that was saved as one has those of each tensor-parallel rank together. Gate and up of swiglu are not: they have a tensor each,
`..._w` and `..._v`. Source: transformer/fsdp_dtensor_checkpoint.py of Megatron-Core 0.16.1, and preprocess_fsdp_dtensor_state_dict
of Megatron-LM's checkpointing.py of August 2026.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.errors import ExportError
from ..common.safe_files import exists, shown
from ..models import settings_of
from .torch_dist_iteration import SETTINGS
from .torch_dist_settings import tensor_parallel_of
from .torch_dist_storage import Storage

_WRAPPERS = re.compile(r"model\.(?:module\.)*")
_HF = re.compile(r"(?:.*\.)?embed_tokens\.weight")
_SEGMENTS = re.compile(r"\.(?:self_attention|mixer)\.(?:in_proj\.weight|conv1d[._](?:weight|bias))$")
_GATED = re.compile(r"\.linear_fc1\.(?:weight|bias)\d*$")


def opened(folder: Path, passed_over: tuple[str, ...]) -> Storage:
    """The tensors and objects of an iteration, by the names that Megatron's parameters have. `ExportError` for names of HF."""
    if exists(folder / SETTINGS):
        return Storage(folder, passed_over)
    storage = Storage(folder, passed_over, lambda key: _WRAPPERS.sub("", key, count=1) if _WRAPPERS.match(key) else key)
    if hf := next((one.key for one in storage.tensors.values() if _HF.fullmatch(one.key)), None):
        raise ExportError(f"{folder} has the names of an HF model ({shown(hf)[1:-1]}). Give it as --dcp-checkpoint")
    return storage


def joined(storage: Storage, names: Iterable[str], config: dict, run: dict[str, Any]) -> list[str]:
    """Which of the parameters `names`, saved whole, have the segments of each tensor-parallel rank together, as sentences.

    run  what the checkpoint's run_config.yaml says
    """
    if exists(storage.folder / SETTINGS) or (tp := tensor_parallel_of(storage, run)) == 1:
        return []
    patterns = (_SEGMENTS, _GATED) if settings_of(config)["gated_linear_unit"] else (_SEGMENTS,)
    how = "does not say" if tp is None else f"says {tp}"
    return [
        f"{storage.folder}: {shown(name)[1:-1]} is one tensor of several segments, which is read only if the tensor-parallel size "
        f"of the run was 1; the checkpoint {how}. Save it with --ckpt-format torch_dist"
        for name in names
        if any(pattern.search(name) for pattern in patterns)
    ]
