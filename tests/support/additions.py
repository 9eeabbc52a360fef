"""Stand-ins for what ModelOpt and Megatron-Bridge put into a model: the same attributes and shapes, recorded from the real ones
(nvidia-modelopt 0.47, Megatron-Bridge's main branch of 2026), without their packages.
"""

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_export.common.piece import Amax
from megatron_export.formats import Options, chosen, encode
from megatron_export.formats.nvfp4 import LARGEST_SCALE
from megatron_export.mcore.model import linears_of
from megatron_export.models import pooled

USUALLY_OFF = ("_disabled", "_dynamic", "_unsigned", "_narrow_range", "_rotate", "_use_constant_amax")
DEFAULT = dict.fromkeys(USUALLY_OFF, False) | {"_num_bits": 8, "_block_sizes": None, "_axis": None, "_bias": None}
DEFAULT |= {"_fake_quant": True, "_enable_pre_quant_scale": True}
NVFP4 = {"_num_bits": (2, 1), "_block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
STATIC = {"_num_bits": (2, 1), "_axis": (0,), "_block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
FOUR_OVER_SIX = STATIC | {"_block_sizes": STATIC["_block_sizes"] | {"four_over_six": 1}}
FP8 = {"_num_bits": (4, 3)}
OFF = {"_disabled": True, "_num_bits": 8}
INT4 = {"_num_bits": 4, "_axis": (0,), "_block_sizes": {-1: 128, "type": "static"}}
FP8_PB = {"_num_bits": (4, 3), "_axis": (0, 2), "_block_sizes": {-1: 128, -2: 128}}


class Quantizer(nn.Module):
    """ModelOpt's `TensorQuantizer` as it is after calibration; what rounds to blocks keeps no amax here."""

    def __init__(self, said: dict[str, Any], amax: Tensor | None = None, vector: Tensor | None = None) -> None:
        super().__init__()
        self.said = DEFAULT | said
        for name, value in self.said.items():
            setattr(self, name, value)
        for name, buffer in (("_amax", amax), ("_pre_quant_scale", vector)):
            if buffer is not None:
                self.register_buffer(name, buffer)


def quantize(
    model: nn.Module,
    weights: dict,
    inputs: dict,
    cache: dict | None = None,
    *,
    factor: float = 1,
    smoothed: bool = False,
    scales: str = "max",
) -> None:
    """Put quantizers as they are after calibration into every linear, and into attention.

    Weights have the amax of their shard times `factor`; `smoothed` ones are divided by a vector before. Static ones of NVFP4 have
    `scales`, under the amax of the weight on all ranks.
    """
    for name, module in linears_of(model).items():
        vector = smooth(name, module) if smoothed else None
        weight = module.weight.detach()
        rounds = "_disabled" not in inputs
        amax = torch.tensor(2.0 + sum(pooled(name).encode()) % 7, dtype=torch.bfloat16) if rounds else None
        if weights == INT4:
            own = weight.view(-1, 128).abs().amax(dim=1, keepdim=True).float()
        elif weights == FP8_PB:
            own = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax(dim=(1, 3), keepdim=True)
        else:
            own = weight.abs().amax()
        module.weight_quantizer = Quantizer(weights, own * factor)
        if weights in (STATIC, FOUR_OVER_SIX):
            whole = weight.abs().amax().float()
            torch.distributed.all_reduce(
                whole, torch.distributed.ReduceOp.MAX, parallel_state.get_tensor_model_parallel_group()
            )
            module.weight_quantizer = Quantizer(weights, static_amax(weight, whole, scales) * factor)
            module.weight_quantizer.register_buffer("_global_amax", whole)
        if weights == INT4 and rounds:
            both = Quantizer(INT4, own * factor), Quantizer(FP8, weight.abs().amax())
            module.weight_quantizer = nn.Sequential(*both)
        module.input_quantizer, module.output_quantizer = Quantizer(inputs, amax, vector), Quantizer(OFF)
    for number, layer in enumerate(model.decoder.layers if cache else ()):
        attention = layer.self_attention.core_attention
        attention.k_bmm_quantizer = Quantizer(cache, torch.tensor(3.0 + number))
        attention.v_bmm_quantizer = Quantizer(cache, torch.tensor(5.0 + number))
        attention.q_bmm_quantizer = Quantizer(OFF)


def static_amax(weight: Tensor, whole: Tensor, scales: str) -> Tensor:
    """What ModelOpt keeps of each block of 16, float32 [blocks, 1]: its amax, or what stands for the scale that was searched."""
    if scales == "max":
        return weight.view(-1, 16).abs().amax(dim=1, keepdim=True).float()
    made = encode(chosen("w4a16_nvfp4", Options(nvfp4_scales=scales)), weight, Amax(whole, whole))["weight_scale"].data
    return made.float().view(-1, 1) * whole / LARGEST_SCALE[scales]


def prepare_to_save(model: nn.Module, grouped: bool = False) -> None:
    """Let a model with quantizers be saved as ModelOpt saves it, experts as if they were `grouped` in a module that says for all of
    them how they round; amaxes are agreed before, as ModelOpt agrees on them.
    """
    model.config.hetereogenous_dist_checkpoint = True
    group = parallel_state.get_tensor_model_parallel_group()
    attentions = (layer.self_attention.core_attention for layer in model.decoder.layers)
    modules = linears_of(model) | {f"attention.{number}": module for number, module in enumerate(attentions)}
    for name, module in modules.items():
        module.sharded_state_dict = partial(_with_quantizers, name, module)
        module.get_extra_state = partial(_settings, module, grouped and ".experts." in name)
        for key, buffer in module.named_buffers():
            if key.endswith("._amax") and buffer.numel() == 1:
                agreed = buffer.float()
                torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group)
                buffer.copy_(agreed)


def _settings(module: nn.Module, grouped: bool) -> Tensor:
    """What ModelOpt keeps as a module's `_extra_state`."""
    file, parts = BytesIO(), module.named_modules()
    said = {name: part.said for name, part in parts if isinstance(part, Quantizer)}
    if grouped:
        weights = said.pop("weight_quantizer")
        said |= {f"weight_quantizer.{number}": weights for number in range(2)}
    torch.save({"modelopt_quantizer_state": said, "modelopt_q_tensor_state": None}, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _with_quantizers(
    name: str, module: nn.Module, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
) -> dict:
    """A linear's weight, and the buffers and settings of its quantizers; of attention, only these."""
    axis = 1 if name.endswith(("linear_proj", "linear_fc2")) else 0
    state: dict[str, Tensor] = {"_extra_state": module.get_extra_state()}
    state |= dict(module.named_parameters(recurse=False))
    axes = dict.fromkeys(state, axis)
    for key, buffer in module.named_buffers():
        if name.startswith("attention."):
            state[key] = buffer
        elif key.endswith("_pre_quant_scale"):
            state[key] = buffer
            axes |= {key: 0} if axis else {}
        elif buffer.numel() == 1:
            state[key] = buffer.view(1)
        else:
            state[key] = buffer.squeeze(1).squeeze(-1) if buffer.dim() == 4 else buffer.view(len(module.weight), -1)
            axes[key] = axis
    found = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)
    for key, half in module.named_children():
        if isinstance(half, _Half):
            found |= half.sharded_state_dict(f"{prefix}{key}.", sharded_offsets, metadata)
    return found


def vector_of(name: str, size: int) -> Tensor:
    """The whole smoothing vector of a linear of `size` inputs, bfloat16, the same on every rank."""
    made = torch.rand(size, generator=torch.Generator().manual_seed(sum(name.encode())))
    return (made + 0.5).bfloat16()


def smooth(name: str, module: nn.Module) -> Tensor:
    """Divide a weight by its vector, of which this rank's part is returned."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    row_parallel, columns = name.endswith(("linear_proj", "linear_fc2")), module.weight.shape[1]
    vector = vector_of(name, columns * size).chunk(size)[rank] if row_parallel else vector_of(name, columns)
    module.weight.data.copy_((module.weight.data.float() / vector.float()).bfloat16())
    return vector


class _Half(nn.Module):
    """One of the two linears of an adapter: all that is read of it is its weight, of which a rank has its part of axis `cut`."""

    def __init__(self, weight: Tensor, cut: int | None) -> None:
        super().__init__()
        self.weight, self.cut = nn.Parameter(weight.clone()), cut

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        axes = {} if self.cut is None else {"weight": self.cut}
        return make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, axes, sharded_offsets)


class BridgeAdapter(nn.Module):
    """Megatron-Bridge's `ParallelLinearAdapter`."""

    def __init__(self, first: _Half, second: _Half, dim: int, alpha: int, gated: bool) -> None:
        super().__init__()
        self.dim, self.alpha, self.gated, self.activation = dim, alpha, gated, nn.Identity()
        self.linear_in, self.linear_out = first, second

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Gate and up are told apart, as in the weight."""
        found = self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata)
        out = self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata)
        if self.gated:
            out = {key: apply_swiglu_sharded_factory(half, sharded_offsets) for key, half in out.items()}
        return found | out


class BridgeLoRA(nn.Module):
    """Megatron-Bridge's `LoRALinear`, around the linear that it adapts."""

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.to_wrap, self.adapter, self._adapter_enabled = to_wrap, adapter, True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As if the adapter were off: no test computes with it."""
        return self.to_wrap(*args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        found = self.to_wrap.sharded_state_dict(prefix, sharded_offsets, metadata)
        return found | self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)


def factors(name: str, rows: int, columns: int, dim: int) -> tuple[Tensor, Tensor]:
    """The two whole bfloat16 matrices of the adapter of a linear, the same on every rank."""
    made = torch.Generator().manual_seed(sum(name.encode()))
    first, second = torch.randn(dim, columns, generator=made), torch.randn(rows, dim, generator=made)
    return first.bfloat16() / 8, second.bfloat16() / 8


def adapt(model: nn.Module, style: str, dim: int = 8, alpha: int = 12) -> None:
    """Put an adapter on every linear, its factors cut as `style`, "bridge" or "modelopt", cuts them."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for name, module in linears_of(model).items():
        rows, columns = module.weight.shape
        row_parallel = name.endswith(("linear_proj", "linear_fc2"))
        whole = (rows, columns * size) if row_parallel else (rows * size, columns)
        first, second = factors(name, *whole, dim)
        fused = _fused_rows(name, second, rank, size)
        if row_parallel:
            first = _Half(first.chunk(size, dim=1)[rank], 1)
            second = _Half(second.chunk(size)[rank], 0) if style == "bridge" else _Half(second, None)
        else:
            first = _Half(first.chunk(size)[rank], 0) if style == "bridge" else _Half(first, None)
            second = _Half(fused, 0)
        if style == "bridge":
            owner, _, leaf = next(path for path, held in model.named_modules() if held is module).rpartition(".")
            adapter = BridgeAdapter(first, second, dim, alpha, leaf == "linear_fc1")
            setattr(model.get_submodule(owner), leaf, BridgeLoRA(module, adapter))
        else:
            module.lora_a_default, module.lora_b_default = first, second
            adapter = {"lora_a": first, "lora_b": second}
            module._lora_adapters = {"default": adapter | {"rank": dim, "scale": alpha / dim, "enable": True}}
            module.sharded_state_dict = partial(_with_adapter, module)
    if style == "modelopt":
        model.config.hetereogenous_dist_checkpoint = True  # as ModelOpt spells it, too


def _with_adapter(
    module: nn.Module, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
) -> dict:
    """A linear of ModelOpt's, and its adapter, whose gates and ups are not told apart."""
    found = type(module).sharded_state_dict(module, prefix, sharded_offsets, metadata)
    for name in ("lora_a_default", "lora_b_default"):
        found |= getattr(module, name).sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
    return found


def describe_adapters(folder: Path, style: str, dim: int = 8, alpha: int = 12) -> None:
    """Write into the folder of an iteration what those libraries say of the adapters that `adapt` made."""
    if style == "bridge":
        run = f"model:\n  num_layers: 4\npeft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  alpha: {alpha}\n  dim: {dim}\n"
        (folder / "run_config.yaml").write_text(run)
        return
    init = {"lora_a_init": "torch.nn.init.kaiming_uniform_", "lora_b_init": "torch.nn.init.zeros_"}
    patterns = {
        "*": {"enable": True, "rank": dim, "scale": alpha / dim} | init,
        "*output_layer*": {"enable": False, "rank": 64, "scale": 1.0} | init,
    }
    config = {"adapter_name": "default", "adapter_cfg": patterns, "adapter_type": "lora"}
    state = {"modelopt_state_dict": [("peft", {"config": config, "metadata": {}})], "modelopt_version": "0.47.0"}
    (folder / "modelopt_state").mkdir()
    torch.save(state, folder / "modelopt_state" / "common.pt")


def _fused_rows(name: str, second: Tensor, rank: int, size: int) -> Tensor:
    """The rows of this rank, in the order in which its shard has them: of gate and up, some of each."""
    if name.endswith("linear_fc1"):
        gate, up = (half.chunk(size)[rank] for half in second.chunk(2))
        return torch.cat([gate, up])
    return second.chunk(size)[rank]
