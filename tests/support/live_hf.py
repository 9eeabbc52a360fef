"""Live transformers models for tests: loaded, or with ModelOpt's quantizers as they were before ModelOpt's own export."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .models import GOLDEN, auto_model, same

LIVE = GOLDEN / "hf"  # NAME/live.json: settings of quantizers; live.safetensors: their buffers, and weights that
# differ from the source; tensors.json: a digest of each tensor that ModelOpt wrote; quantization.json: what it said of it


class Quantizer(nn.Module):
    """What stands for a TensorQuantizer: its attributes and buffers."""

    def __init__(self, attributes: dict[str, Any], buffers: dict[str, Tensor]) -> None:
        super().__init__()
        vars(self).update(attributes)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def loaded(source: Path, name: str = "llama31", **options: Any) -> nn.Module:
    """A checkpoint as transformers loads it."""
    return auto_model(name).from_pretrained(source, dtype=torch.bfloat16, **options)


def rebuilt(folder: Path) -> nn.Module:
    """The live model that a golden of ModelOpt's HF route was exported from. Of transformers 4.57, experts are modules."""
    model = loaded(GOLDEN / "models" / f"{folder.name.split('-')[0]}-bf16")
    if folder.name.endswith("457"):
        take_experts_apart(model)
    for name, tensor in load_file(folder / "live.safetensors").items():
        if "_quantizer" not in name:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    hang_quantizers(model, folder)
    return model


def hang_quantizers(model: nn.Module, folder: Path) -> None:
    """Hang the quantizers that a golden has into a model."""
    state, said = load_file(folder / "live.safetensors"), json.loads((folder / "live.json").read_text())
    for name, its in said["quantizers"].items():
        buffers = {key: state[f"{name}.{key}"] for key in its.get("buffers", ())}
        put(model, name, _as_python(said["settings"][its["settings"]]), buffers)


def put(model: nn.Module, name: str, attributes: dict[str, Any], buffers: dict[str, Tensor]) -> None:
    """Hang a quantizer into a model; what its name calls for between is made."""
    *owners, leaf = name.split(".")
    module = model
    for owner in owners:
        if owner not in module._modules:
            module.add_module(owner, nn.Module())
        module = module._modules[owner]
    module.add_module(leaf, Quantizer(attributes, buffers))


def take_experts_apart(model: nn.Module) -> None:
    """Make the fused experts of transformers 5 into modules, as transformers 4 has them."""
    for name, module in list(model.named_modules()):
        if not name.endswith(".mlp.experts"):
            continue
        apart = nn.ModuleList()
        for gate_up, down in zip(module.gate_up_proj.data, module.down_proj.data, strict=True):
            gate, up = gate_up.chunk(2)
            linears = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            apart.append(nn.ModuleDict({leaf: _linear(weight) for leaf, weight in linears.items()}))
        model.get_submodule(name.rpartition(".")[0])._modules["experts"] = apart


def digest(tensor: Tensor) -> str:
    """The first 64 bits of the sha256 of a tensor's dtype and bytes, as tensors.json of a golden has them."""
    held = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return sha256(str(tensor.dtype).encode() + held).hexdigest()[:16]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a model's state dict holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def traces_of(model: nn.Module) -> dict[str, Any]:
    """What an export could leave behind in a model: attributes, hooks, children, by module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        name: (type(module), sorted(vars(module)), [len(vars(module)[hook]) for hook in hooks], list(module._modules))
        for name, module in model.named_modules()
    }


def assert_untouched(model: nn.Module, state: dict[str, Tensor], traces: dict[str, Any]) -> None:
    """A model has the state dict, the attributes and the hooks that it had before."""
    now = model.state_dict()
    assert list(now) == list(state)
    assert [name for name in now if not same(now[name], state[name])] == []
    assert traces_of(model) == traces


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(1, 1, bias=False)
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return made


def _as_python(found: Any) -> Any:
    """JSON's lists as tuples, and keys that are numbers as numbers."""
    if isinstance(found, list):
        return tuple(map(_as_python, found))
    if isinstance(found, dict):
        return {int(key) if key.lstrip("-").isdigit() else key: _as_python(value) for key, value in found.items()}
    return found
