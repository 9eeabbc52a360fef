"""A Megatron-Core model seen as shards under canonical names: the only file that knows Megatron's modules."""

import re
from collections.abc import Callable, Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.torch_norm import L2Norm
from torch import Tensor, nn

from ..common.errors import ExportError
from ..models import canonical, is_linear_weight, makes_keys, without_additions
from ..models.layouts import QKV, Identity, Layout, Split

ACTIVATIONS = {"silu": torch.nn.functional.silu, "quick_gelu": quick_gelu}


def chunks_of(model: nn.Module | list[nn.Module]) -> list[nn.Module]:
    """The bare `GPTModel`s of this rank, one per virtual pipeline stage, out of DDP, Float16Module and the like."""
    return [list(_unwrapping(chunk))[-1] for chunk in (model if isinstance(model, list) else [model])]


def finish_gathering(model: nn.Module | list[nn.Module]) -> None:
    """Let Megatron's DDP finish what it puts off: with `overlap_param_gather` the optimizer's new weights reach the other
    replicas only in the next forward pass. Collective over replicas, as Megatron's own checkpointing does it.
    """
    for chunk in model if isinstance(model, list) else [model]:
        for wrapper in _unwrapping(chunk):
            if isinstance(wrapper, DistributedDataParallel) and wrapper.ddp_config.overlap_param_gather:
                wrapper.start_param_sync(force_sync=True)


def shards_of(model: nn.Module | list[nn.Module]) -> dict[str, Tensor]:
    """Canonical name -> this rank's shard, the live tensor itself, for every parameter and persistent buffer.

    Left out: adapters and quantizers, the copies of the embedding that Megatron keeps on the last pipeline stage, of tied models as
    `output_layer.weight`, and for layers that predict one more token under its own name.
    """
    shards: dict[str, Tensor] = {}
    for chunk in chunks_of(model):
        for full, tensor in _canonical_tensors(chunk):
            if full == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                continue
            if full == "embedding.word_embeddings.weight" and not chunk.pre_process:
                continue
            if full in shards:
                raise ExportError(f"two parameters of this rank are both {full}")
            shards[full] = tensor.detach()
    return shards


def copies_of(model: nn.Module | list[nn.Module]) -> dict[str, Tensor]:
    """The copy of the embedding that this rank keeps, where the parameter itself lives elsewhere: of a tied model on the last
    pipeline stage, and of one whose layers predict one more token where these are. By canonical name.
    """
    last = chunks_of(model)[-1]
    if any(chunk.pre_process for chunk in chunks_of(model)):
        return {}
    if last.post_process and last.share_embeddings_and_output_weights:
        return {"embedding.word_embeddings.weight": last.output_layer.weight.detach()}
    if last.mtp_process:
        return {"embedding.word_embeddings.weight": last.embedding.word_embeddings.weight.detach()}
    return {}


def linears_of(model: nn.Module | list[nn.Module]) -> dict[str, nn.Module]:
    """Canonical module name -> module, for every linear that a format may quantize; experts in one module, as Transformer
    Engine groups them, under the name of one without its number.
    """
    linears = {}
    for chunk in chunks_of(model):
        for name, module in canonical_modules(chunk):
            if is_linear_weight(f"{name}.weight"):
                linears[name] = module  # of one with an adapter around it, the linear itself, which comes last
    return linears


def canonical_modules(chunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a chunk under their canonical names, an adapter before the module that it wraps under the same; what is
    inside of adapters and quantizers is left out.
    """
    numbers, experts = _layer_numbers(chunk), _expert_numbers(chunk)
    for name, module in chunk.named_modules():
        if (plain := without_additions(name)) is not None:
            yield canonical(f"{plain}.weight", numbers, experts).removesuffix(".weight"), module


def weights_of(model: nn.Module | list[nn.Module]) -> dict[str, Tensor]:
    """Canonical module name -> this rank's shard of its weight, for every linear that a format may quantize."""
    return {name.removesuffix(".weight"): shard for name, shard in shards_of(model).items() if is_linear_weight(name)}


def whole_of(model: nn.Module | list[nn.Module]) -> set[str]:
    """Canonical names of the linears that every rank holds whole here, though other layer specs cut them."""
    config = chunks_of(model)[0].config
    if not config.multi_latent_attention:
        return set()
    rows = {
        "linear_q_down_proj": config.q_lora_rank,
        "linear_kv_down_proj": config.kv_lora_rank + config.qk_pos_emb_head_dim,
    }
    return {name for name, weight in weights_of(model).items() if rows.get(name.rpartition(".")[2]) == weight.shape[0]}


def grouped_weights(module: nn.Module) -> list[Tensor]:
    """The weights of a module that holds those of all local experts, as Transformer Engine's does; of others, none."""
    return [getattr(module, f"weight{number}") for number in range(getattr(module, "num_gemms", 0))]


def experts_of(model: nn.Module | list[nn.Module]) -> dict[str, nn.Module]:
    """Canonical name of a layer's experts -> its `MoELayer`, whose `experts` are called with (tokens sorted by expert,
    how many tokens each local expert has, the probability of each token).
    """
    return {
        f"decoder.layers.{number}.mlp.experts": layer.mlp
        for chunk in chunks_of(model)
        for number, layer in layers_of(chunk)
        if hasattr(getattr(layer, "mlp", None), "experts")
    }


def given_to_experts(layer: nn.Module, tokens: Tensor) -> Callable[[int], Tensor]:
    """What each expert of a `MoELayer`, by global number, is given of `tokens` [tokens, hidden]: them, or, where the
    probability is multiplied into the input (Llama 4), their product with its score.
    """
    if not layer.config.moe_apply_probs_on_input:
        return lambda expert: tokens
    scores = layer.router.gating(tokens).float().sigmoid().to(tokens.dtype)
    return lambda expert: tokens * scores[:, expert, None]


def local_experts_of(model: nn.Module | list[nn.Module]) -> list[int]:
    """The global numbers of this rank's experts, the same in every layer that has any."""
    return next((numbers for chunk in chunks_of(model) if (numbers := _expert_numbers(chunk))), [])


def heads_of(model: nn.Module | list[nn.Module]) -> QKV:
    """How a model's fused q, k and v are laid out; known on every rank, also on one without layers."""
    config = chunks_of(model)[0].config
    return QKV(config.num_attention_heads // config.num_query_groups, config.kv_channels)


def layouts_of(model: nn.Module | list[nn.Module]) -> dict[str, Layout]:
    """Canonical module name -> how its output rows are laid out, for every linear of this rank."""
    layouts = {}
    for name in weights_of(model):
        config = chunks_of(model)[0].config
        if makes_keys(f"{name}.weight"):
            layouts[name] = heads_of(model)
        elif name.endswith("linear_fc1") and config.gated_linear_unit:
            layouts[name] = Split(("gate", "up"))
        else:
            layouts[name] = Identity()
    return layouts


def attentions_of(model: nn.Module | list[nn.Module]) -> dict[str, nn.Module]:
    """Canonical name of a layer's self attention -> its core attention, which is called with (query, key, value, ...).

    Latent attention is left out: what engines cache of it are not its keys and values.
    """
    return {
        f"decoder.layers.{number}.self_attention": layer.self_attention.core_attention
        for chunk in chunks_of(model)
        for number, layer in layers_of(chunk)
        if hasattr(getattr(layer, "self_attention", None), "linear_qkv")
    }


def norms_heads(layer: nn.Module) -> bool:
    """Whether a layer norms its queries and keys without a weight (Llama 4)."""
    return isinstance(getattr(getattr(layer, "self_attention", None), "q_layernorm", None), L2Norm)


def linear_input(module: nn.Module, hidden: Tensor) -> Tensor:
    """What a linear multiplies with its weight, given what the module was called with.

    Transformer Engine's fused modules are called with the input of the norm that they contain.
    """
    if not hasattr(module, "layer_norm_weight"):
        return hidden
    if module.normalization != "RMSNorm" or module.zero_centered_gamma:
        raise ExportError(f"calibration of a fused {module.normalization} is not supported; only RMSNorm is")
    return torch.rms_norm(hidden, hidden.shape[-1:], module.layer_norm_weight, module.eps)


def _unwrapping(chunk: nn.Module) -> Iterator[nn.Module]:
    """A model chunk, what it wraps, and so on down to the bare `GPTModel`."""
    yield chunk
    while not hasattr(chunk, "decoder"):
        if not hasattr(chunk, "module"):
            raise ExportError(f"a {type(chunk).__name__} is not a Megatron-Core GPTModel: it has no decoder")
        chunk = chunk.module
        yield chunk


def _predicting(chunk: nn.Module) -> Iterator[nn.Module]:
    """A chunk's layers that predict one more token, around a layer like those of the decoder."""
    yield from chunk.mtp.layers if getattr(chunk, "mtp", None) is not None else ()


def pattern_of(chunk: nn.Module) -> str | None:
    """Of Megatron's `HybridModel` (`MambaModel` before 0.17), which kind each of its layers is, None for a `GPTModel`.

    There a layer is an attention (*) or what follows it (- for an MLP, E for experts); two make one of HF's.
    """
    pattern = getattr(chunk, "hybrid_layer_pattern", None) or getattr(chunk, "hybrid_override_pattern", None)
    if pattern is None:
        return None
    kinds = pattern.replace("|", "")
    if not re.fullmatch(r"(\*[-E])+", kinds):
        raise ExportError(
            f"a {type(chunk).__name__} with the layers {pattern!r}: only pairs of attention and MLP or experts are exported"
        )
    return kinds


def _layer_numbers(chunk: nn.Module) -> dict[str, list[int]]:
    per_layer = 2 if pattern_of(chunk) else 1
    return {
        "decoder": [(layer.layer_number - 1) // per_layer for layer in chunk.decoder.layers],
        "mtp": [chunk.config.num_layers + outer.layer_number - 1 for outer in _predicting(chunk)],
    }


def layers_of(chunk: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The global number of each transformer layer of a chunk, and the layer."""
    numbers = _layer_numbers(chunk)
    inner = [getattr(outer, "transformer_layer", None) or outer.mtp_model_layer for outer in _predicting(chunk)]
    yield from zip(numbers["decoder"] + numbers["mtp"], [*chunk.decoder.layers, *inner], strict=True)


def _expert_numbers(chunk: nn.Module) -> list[int]:
    return next(
        (
            list(layer.mlp.local_expert_indices)
            for _, layer in layers_of(chunk)
            if hasattr(getattr(layer, "mlp", None), "experts")
        ),
        [],
    )


def _canonical_tensors(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    numbers, experts = _layer_numbers(chunk), _expert_numbers(chunk)
    for name, tensor in _tensors(chunk):
        prefix, _, leaf = name.rpartition(".")
        if prefix.endswith("mlp.experts") and leaf in _LEGACY:  # [hidden, experts * 2 ffn], [experts * ffn, hidden]
            stacked = tensor.view(len(experts), tensor.shape[0], -1) if leaf == "weight1" else tensor
            stacked = stacked.reshape(len(experts), -1, stacked.shape[-1])
            for number, weight in enumerate(stacked):
                yield canonical(f"{prefix}.{_LEGACY[leaf]}.weight{number}", numbers, experts), weight.T
        else:
            yield canonical(name, numbers, experts), tensor


_LEGACY = {"weight1": "linear_fc1", "weight2": "linear_fc2"}  # of Megatron's grouped GEMM without Transformer Engine


def _tensors(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the names that they have without adapters and quantizers, which are left out."""
    for name, tensor in _all_tensors(chunk):
        if (plain := without_additions(name)) is not None:
            yield plain, tensor


def _all_tensors(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from chunk.named_parameters()
    for prefix, module in chunk.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
