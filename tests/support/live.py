"""In a rank of a pool: live Megatron models, random or with the weights of an HF folder, and what is left behind in them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_export.common.errors import ExportError
from megatron_export.distributed.topology import Topology
from megatron_export.mcore import parallel_state
from megatron_export.mcore.build import build_model
from megatron_export.mcore.load_hf import load_hf_weights

from .models import LENGTH, read_json, same


def world(**sizes: int | None) -> AbstractContextManager[None]:
    """Megatron's parallel state of these sizes, over gloo."""
    return parallel_state.started(**{"tp": 1, "pp": 1, "device": "cpu", **sizes})


@contextmanager
def blank(
    config: dict, length: int | None = 1, pp_layout: str | None = None, **sizes: int | None
) -> Iterator[tuple[Any, Topology]]:
    """This rank's part of the model of config.json's dict at these sizes, its weights random, and the same every time."""
    with world(**sizes):
        with parallel_state.current() as here:
            torch.manual_seed(0)
            model = build_model(config, here, max_sequence_length=length, initialize=True, pp_layout=pp_layout)
        yield model, here


@contextmanager
def loaded(
    source: Path,
    tp: int = 1,
    pp: int = 1,
    *,
    length: int | None = LENGTH,
    dtype: torch.dtype = torch.bfloat16,
    **sizes: int | None,
) -> Iterator[tuple[Any, Topology]]:
    """This rank's part of a model at these sizes with the weights of `source`; a list of its chunks where `vpp` is given."""
    torch.manual_seed(5)
    config = read_json(source / "config.json")
    with world(tp=tp, pp=pp, **sizes):
        with parallel_state.current() as here:
            model = build_model(config, here, max_sequence_length=length, dtype=dtype)
            load_hf_weights(model, source, config, here)
        yield model, here


def batches(source: Path, size: int = 4) -> list[Tensor]:
    """The calibration token ids of `source`, `size` samples each; the last batch may be smaller."""
    return list(load_file(source.parent / "ids" / "calibration.safetensors")["input_ids"].split(size))


def refusal(call: Callable[..., object], *given: Any, **named: Any) -> str:
    """What the `ExportError` says that a call raises, "" where it raises none."""
    try:
        call(*given, **named)
    except ExportError as error:
        return str(error)
    return ""


def traces(model: nn.Module) -> dict[str, object]:
    """All that a training script could notice: weights, gradients, every attribute of every module, random state."""
    found: dict[str, object] = {"random state": torch.get_rng_state()}
    found |= {f"config {key}": value for key, value in vars(model.config).items()}
    for name, tensor in model.state_dict().items():
        found[f"state {name}"] = tensor.clone() if isinstance(tensor, Tensor) else type(tensor)
    for name, weight in model.named_parameters():
        gradient = None if weight.grad is None else weight.grad.clone()
        found |= {f"object {name}": weight, f"requires_grad {name}": weight.requires_grad}
        found |= {f"gradient {name}": weight.grad, f"gradient's values {name}": gradient}
    for name, module in model.named_modules():
        for key, value in vars(module).items():  # hooks are in dicts: _forward_pre_hooks and the like
            items = value.items() if isinstance(value, dict) else [("", value)]
            found |= {f"attribute {name}.{key} {inner}": held for inner, held in items}
    return found


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Names of what was added, removed, replaced by another object, or (copied tensors) has other bytes."""
    changed = before.keys() ^ after.keys()
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        equal = isinstance(old, Tensor) and isinstance(new, Tensor) and same(old, new)
        changed |= set() if old is new or equal else {name}
    return sorted(changed)
