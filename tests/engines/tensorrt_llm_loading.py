"""Checkpoints loaded by parts of TensorRT-LLM's files on a CPU, each twice: into memory of zeros and into memory of ones; a JSON
line about each.

    TENSORRT_LLM=SOURCES python -m tests.engines.tensorrt_llm_loading CHECKPOINT...

What differs between the two was never loaded; what was copied from codes into numbers is counted too. Parts of its files are the
configs' reader, what is left out and in which algorithm each module is, the walk over modules and names, and its linears with their
loaders. The test's own is the tree of modules, of those linears, as Llama, Mistral, Qwen 2, Qwen 3 and Qwen 3 MoE have it.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from .tensorrt_llm_source import Alone, taken

DERIVED = (
    "inv_input_scale",
    "kv_scales",
    "inv_kv_scales",
    "alpha",
)  # of other numbers, or 1 where a checkpoint has none

# Scales that are 1 from the beginning, and must be filled.
ONES = (
    "weight_scale",
    "fc31_alpha",
    "fc2_alpha",
    "fc31_input_scale",
    "fc2_input_scale",
    "fc2_quant",
    "fc31_input_dequant",
)


class Weight(nn.Module):
    """A norm, or an embedding."""

    def __init__(self, own: ModuleType, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(own.torch.empty(shape, dtype=torch.bfloat16), requires_grad=False)


def linear(own: ModuleType, config: Any, rows: int | dict[str, int], columns: int, bias: bool = False) -> nn.Module:
    """One of its linears; of several parts, by their rows, it joins them."""
    parts = rows if isinstance(rows, dict) else {}
    mode = own.WeightMode("fused_qkv_linear" if "q" in parts else "fused_gate_up_linear" if parts else "vanilla")
    starts = [sum(list(parts.values())[:number]) for number in range(len(parts))]
    return own.Linear(
        columns,
        sum(parts.values()) if parts else rows,
        bias=bias,
        dtype=torch.bfloat16,
        mapping=config.mapping,
        tensor_parallel_mode=own.TensorParallelMode("column" if parts else "row"),
        quant_config=config.quant_config,
        weights_loading_config=own.WeightsLoadingConfig(weight_mode=mode),
        skip_create_weights_in_init=True,
        fused_weight_shard_indices_mapping={
            part: (start, parts[part]) for part, start in zip(parts, starts, strict=True)
        },
    )


def attention(own: ModuleType, config: Any, text: Any) -> nn.Module:
    """Grouped queries; Qwen 3 has norms of queries and keys, Qwen 2 biases."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys, queries = text.num_key_value_heads * head, text.num_attention_heads * head
    built = own.Attention()
    built.quant_config = config.quant_config
    built.qkv_proj = linear(
        own, config, {"q": queries, "k": keys, "v": keys}, text.hidden_size, "qwen2" in text.model_type
    )
    built.o_proj = linear(own, config, text.hidden_size, queries)
    if "qwen3" in text.model_type:
        built.q_norm, built.k_norm = Weight(own, head), Weight(own, head)
    return built


def mlp(own: ModuleType, config: Any, text: Any) -> nn.Module:
    """A gated MLP."""
    built = nn.Module()
    built.gate_up_proj = linear(
        own, config, {"gate": text.intermediate_size, "up": text.intermediate_size}, text.hidden_size
    )
    built.down_proj = linear(own, config, text.hidden_size, text.intermediate_size)
    return built


def experts(own: ModuleType, config: Any, text: Any) -> nn.Module:
    """A router and experts, one by one in the checkpoint, on the backend that it takes where it has the choice."""
    built, inside = nn.Module(), own.CutlassFusedMoE()
    built.gate, built.experts = Weight(own, text.num_experts, text.hidden_size), inside
    numbers = {
        "num_experts": text.num_experts,
        "expert_size_per_partition": text.num_experts,
        "tp_size": 1,
        "tp_rank": 0,
    }
    sizes = {
        "hidden_size": text.hidden_size,
        "intermediate_size_per_partition": text.moe_intermediate_size,
        "expand_intermediate_size_per_partition": 2 * text.moe_intermediate_size,
        "intermediate_size_expand_ratio": 2,
    }
    kinds = {"bias": False, "dtype": torch.bfloat16, "is_gated_activation": True, "has_int8_woq_per_channel": False}
    told = {
        "weight_loading_mode": own.MoEWeightLoadingMode.VANILLA,
        "_weights_created": False,
        "layer_load_balancer": None,
    }
    vars(inside).update(numbers | sizes | kinds | told, initial_local_expert_ids=list(range(text.num_experts)))
    inside.quant_config = config.quant_config
    inside._add_raw_shared_weights_for_unmap = own.silent

    def create_weights() -> None:
        inside.quant_method = inside._get_quant_method()
        inside.quant_method.create_weights(inside)

    def load_weights(weights: list[dict], allow_partial_loading: bool = False) -> None:
        inside.quant_method.load_weights(inside, weights[0], inside.weight_loading_mode)

    inside.create_weights, inside.load_weights = create_weights, load_weights
    return built


def routed(text: Any, number: int) -> bool:
    """Whether a layer has experts."""
    step = getattr(text, "decoder_sparse_step", 1)
    return "moe" in text.model_type and number not in text.mlp_only_layers and (number + 1) % step == 0


def model(own: ModuleType, config: Any) -> nn.Module:
    """A model whose linears are as its config says, each made when it is known in which algorithm."""
    text = config.pretrained_config
    built = own.DecoderModelForCausalLM()
    built.model_config = config
    built.model = nn.Module()
    built.model.embed_tokens = Weight(own, text.vocab_size, text.hidden_size)
    built.model.norm = Weight(own, text.hidden_size)
    built.model.layers = nn.ModuleList(nn.Module() for _ in range(text.num_hidden_layers))
    for number, layer in enumerate(built.model.layers):
        layer.self_attn = attention(own, config, text)
        layer.mlp = (experts if routed(text, number) else mlp)(own, config, text)
        layer.input_layernorm, layer.post_attention_layernorm = (
            Weight(own, text.hidden_size),
            Weight(own, text.hidden_size),
        )
    built.lm_head = linear(own, config, text.vocab_size, text.hidden_size)
    built.lm_head.quant_config = own.DecoderModelForCausalLM._resolve_lm_head_quant_config(config)
    built.__post_init__()
    return built


def filled(own: ModuleType, built: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint has to fill."""
    tied = getattr(built.model_config.pretrained_config, "tie_word_embeddings", False)
    return {
        name: one
        for name, one in built.named_parameters()
        if name.rpartition(".")[2] not in DERIVED and not (tied and name.startswith("lm_head"))
    }


class Reads(TorchFunctionMode):
    """Which tensors anything was done with."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, does: Any, kinds: Any, given: tuple = (), named: dict | None = None) -> Any:
        if getattr(does, "__name__", "") != "__get__":
            self.ids |= {id(one) for one in given if isinstance(one, torch.Tensor)}
        return does(*given, **(named or {}))


def loaded(own: ModuleType, folder: Path, byte: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The bytes of all parameters, loaded into memory that is full of one; tensors that nobody looked at. Raises what TensorRT-LLM
    raises."""
    own.torch.byte = byte
    own.converted.clear()
    config = own.ModelConfig.from_pretrained(str(folder), mapping=Alone())
    weights = {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}
    built = model(own, config)
    for name, one in built.named_parameters():
        if name.endswith(ONES):
            one.data.copy_(own.torch.empty(one.shape, dtype=one.dtype))
    of_experts = "moe" in config.pretrained_config.model_type
    mapper = own.Qwen2MoeHfWeightMapper() if of_experts else own.HfWeightMapper()
    mapper.init_model_and_config(built, config)
    reads = Reads()
    with reads:
        own._load_weights_impl_v2(built, weights, mapper)
    found = {name: one.data.contiguous().view(-1).view(torch.uint8) for name, one in filled(own, built).items()}
    return found, sorted(name for name, one in weights.items() if id(one) not in reads.ids)


def tried(own: ModuleType, folder: Path) -> dict:
    """What became of a checkpoint: an `error`, parameters that were not filled (`lacking`), codes that were taken for numbers
    (`converted`), tensors that were not read (`unread`)."""
    said = {"folder": str(folder), "error": None, "lacking": [], "converted": [], "unread": []}
    try:
        (zeros, unread), (ones, _) = loaded(own, folder, 0), loaded(own, folder, 255)
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is its verdict
        return said | {"error": f"{type(error).__name__}: {error}"}
    lacking = [name for name in zeros if not zeros[name].equal(ones[name])]
    return said | {"lacking": lacking, "converted": own.converted[:], "unread": unread}


def main(folders: list[str]) -> None:
    """Try every checkpoint."""
    own = taken()
    for folder in folders:
        print(json.dumps(tried(own, Path(folder))), flush=True)


if __name__ == "__main__":
    os.environ["TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL"] = "1"
    main(sys.argv[1:])
