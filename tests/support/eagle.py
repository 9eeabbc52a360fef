"""In a rank: an EAGLE-3 draft in a live Megatron model, its modules called as ModelOpt calls them, which is not needed here."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_export.mcore.cpu_compat import without_cuda
from megatron_export.mcore.model import chunks_of

from .live import loaded
from .models import read_json

CUT_ROWS = ("linear_qkv.weight", "eagle_output_layer.weight")
CUT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def eagle_config(base: dict, layers: int = 1, **changes: Any) -> TransformerConfig:
    """What ModelOpt keeps as `model.eagle_config`: sizes that are not the base's, and the attributes of EAGLE."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=base["hidden_size"],
        ffn_hidden_size=base["intermediate_size"],
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        layernorm_epsilon=1e-5,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        tensor_model_parallel_size=tp,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        hetereogenous_dist_checkpoint=layers > 1,
    )
    said = {
        "rotary_base": 10000.0,
        "rotary_percent": 1.0,
        "rope_scaling": False,
        "rope_scaling_factor": None,
        "position_embedding_type": "rope",
        "vocab_size": base["vocab_size"],
        "draft_vocab_size": base["vocab_size"] // 2,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_aux_hidden_state": True,
        "use_mtp_layernorm": False,
        "eagle_aux_hidden_state_layer_ids": [0, 1],
        "parallel_draft_step": 1,
        "has_lm_head": False,
    }
    for name, value in (said | changes).items():
        setattr(config, name, value)
    return config


class Eagle(MegatronModule):
    """The modules of ModelOpt's `EagleModule`, and no computation."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        hidden, read = config.hidden_size, len(config.eagle_aux_hidden_state_layer_ids)
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        blocks = TransformerBlockSubmodules([layer] * config.num_layers, layer_norm=WrappedTorchNorm)
        self.enorm = WrappedTorchNorm(config, hidden)
        self.fc = nn.Linear(read * hidden, hidden, bias=False)
        self.decoder = TransformerBlock(config, blocks, pre_process=True, post_process=True)
        attention = self.decoder.layers[0].self_attention
        attention.linear_qkv = self._columns(2 * hidden, attention.linear_qkv.output_size)
        if config.draft_vocab_size != config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        if config.draft_vocab_size != config.vocab_size or config.has_lm_head:
            self.eagle_output_layer = self._columns(hidden, config.draft_vocab_size)

    def _columns(self, inputs: int, outputs: int) -> ColumnParallelLinear:
        how = {"init_method": self.config.init_method, "bias": False, "gather_output": False}
        return ColumnParallelLinear(inputs, outputs, config=self.config, **how)


def numbers(shapes: Mapping[str, tuple[int, ...]], most: int) -> dict[str, Tensor]:
    """Name -> whole tensor, random by its name; a map of tokens below `most`."""
    found = {}
    for name, shape in shapes.items():
        own = torch.Generator().manual_seed(sum(name.encode()))
        if name == "d2t":
            ids = torch.randperm(most, generator=own)[: shape[0]].sort().values
            found[name] = ids - torch.arange(shape[0])
        else:
            found[name] = (torch.randn(shape, generator=own) / 8 + (len(shape) == 1)).bfloat16()
    return found


def whole_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """The shape of a whole tensor, from that of a shard."""
    rows = tp if name.endswith((*CUT_ROWS, "linear_fc1.weight")) else 1
    columns = tp if name.endswith(CUT_COLUMNS) else 1
    return (shape[0] * rows, *(size * columns for size in shape[1:]))


def shard(name: str, whole: Tensor, rank: int, tp: int) -> Tensor:
    """What Megatron has on a rank of a whole tensor."""
    if name.endswith(CUT_ROWS):
        return whole.chunk(tp)[rank]
    if name.endswith(CUT_COLUMNS):
        return whole.chunk(tp, dim=1)[rank]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    return whole


class Quantizer(nn.Module):
    """A quantizer of ModelOpt's, as far as it is read."""

    def __init__(self, amax: Tensor | None, **said: Any) -> None:
        super().__init__()
        for name, value in {
            "_num_bits": 8,
            "_disabled": amax is None,
            "_axis": None,
            "_block_sizes": None,
            **said,
        }.items():
            setattr(self, name, value)
        if amax is not None:
            self.register_buffer("_amax", amax.clone())


FP8 = {"_num_bits": (4, 3)}
NVFP4 = {"_num_bits": (2, 1), "_block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


def quantize(draft: Eagle, kind: dict, amax: Callable[[str], Tensor], also: tuple[str, ...] = ()) -> None:
    """Give the linears in its layers quantizers of a kind, and those of the names `also`; `amax` is asked by their names."""
    for name, module in list(draft.named_modules()):
        if name.rpartition(".")[2].startswith("linear_") or name in also:
            for part in ("weight_quantizer", "input_quantizer"):
                module.add_module(part, Quantizer(amax(f"{name}.{part}"), **kind))
            module.add_module("output_quantizer", Quantizer(None))


@contextmanager
def drafted(
    source: Path, tp: int = 1, pp: int = 1, *, weights: dict[str, Tensor] | None = None, rest: bool = False, **how: Any
) -> Iterator[tuple[Any, Any]]:
    """This rank's part of a model with a draft; `how` is as of `eagle_config`. Its weights are `weights`, or random by name; with
    `rest`, those that `weights` has not are 1 in norms and 0 in matrices.
    """
    base = read_json(source / "config.json")
    with loaded(source, tp, pp) as (model, here):
        chunk = chunks_of(model)[-1]
        chunk.eagle_config = eagle_config(base, **how)
        if chunk.post_process:
            with without_cuda(torch.device("cpu")):
                chunk.eagle_module = Eagle(chunk.eagle_config).bfloat16()
            rank, held = parallel_state.get_tensor_model_parallel_rank(), chunk.eagle_module.state_dict(keep_vars=True)
            held = {name: one for name, one in held.items() if isinstance(one, Tensor)}
            shapes = {name: whole_shape(name, tuple(one.shape), tp) for name, one in held.items()}
            if rest:
                others = {name: torch.full(shape, float(len(shape) == 1)) for name, shape in shapes.items()}
                weights = others | (weights or {})
            for name, whole in (weights or numbers(shapes, base["vocab_size"])).items():
                held[name].data.copy_(shard(name, whole, rank, tp))
        yield model, here
