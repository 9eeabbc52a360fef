"""A Megatron-Core model seen as shards under canonical names: the only file that knows Megatron's modules."""

import re
from collections.abc import Callable, Iterator

import torch
from megatron.core.activations import fast_gelu, squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.torch_norm import L2Norm
from torch import Tensor, nn

from ..common.errors import ExportError
from ..common.shards import Shards
from ..common.storage import kind_of
from ..models import HEAD, canonical, child_of, is_linear_weight, makes_keys, without_additions
from ..models.layer_kinds import LETTERS
from ..models.layouts import QKV, Identity, Layout, Split
from .linear_attention import check_delta_nets, without_beta_and_alpha

# A rank's part, or its virtual pipeline stages; perhaps wrapped in DDP and the like.
Model = nn.Module | list[nn.Module]
ACTIVATIONS = {"silu": nn.functional.silu, "quick_gelu": quick_gelu, "fast_gelu": fast_gelu}
ACTIVATIONS |= {"squared_relu": squared_relu}


def chunks_of(model: Model) -> list[nn.Module]:
    """The bare `GPTModel`s of this rank, one per virtual stage, out of DDP and the like. `ExportError` for other models."""
    return [list(unwrapping(chunk))[-1] for chunk in (model if isinstance(model, list) else [model])]


def shards_of(model: Model) -> Shards:
    """Canonical name -> this rank's shard, the live tensor itself if it is plain, for every parameter and persistent buffer.

    Adapters, quantizers, drafts (drafts.py) and the copies of the embedding (`copies_of`) are left out.
    """
    shards: dict[str, Tensor] = {}
    for chunk in chunks_of(model):
        tied, copied = chunk.share_embeddings_and_output_weights, not chunk.pre_process
        copies = ["output_layer.weight"] * tied + ["embedding.word_embeddings.weight"] * copied
        for full, tensor in canonical_tensors(chunk):
            if full in copies:
                continue
            if full in shards:
                raise ExportError(f"two parameters of this rank are both {full}")
            shards[full] = tensor if kind_of(tensor) else tensor.detach()
    return Shards(shards)


def copies_of(model: Model) -> dict[str, Tensor]:
    """The copy of the embedding that this rank keeps, by canonical name; {} where it has none, or the embedding itself.

    The last pipeline stage of a tied model has one as its output layer, and a stage with MTP layers has one of its own.
    """
    last = chunks_of(model)[-1]
    if any(chunk.pre_process for chunk in chunks_of(model)):
        return {}
    tied = last.post_process and last.share_embeddings_and_output_weights
    if not (tied or (hasattr(last, "mtp_process") and last.mtp_process)):  # a `MambaModel` has none
        return {}
    holder = last.output_layer if tied else last.embedding.word_embeddings
    return {"embedding.word_embeddings.weight": holder.weight if kind_of(holder.weight) else holder.weight.detach()}


def linears_of(model: Model, head: bool = False) -> dict[str, nn.Module]:
    """Canonical module name -> module, for every linear in a layer that a format may quantize, and with `head` for the output
    layer, if it is not the embedding; without a number for experts in one module.
    """
    return {
        name: module  # of one with an adapter around it, the linear itself, which comes last
        for chunk in chunks_of(model)
        for name, module in canonical_modules(chunk)
        if is_linear_weight(f"{name}.weight")
        or (head and f"{name}.weight" == HEAD and not chunk.share_embeddings_and_output_weights)
    }


def canonical_modules(chunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a chunk by canonical name, but for those in adapters, quantizers and drafts. An adapter comes before what it
    wraps.
    """
    numbers, experts = _layer_numbers(chunk), local_experts_of(chunk)
    for name, module in chunk.named_modules():
        if (plain := without_additions(name)) is not None and not child_of(plain):
            yield canonical(f"{plain}.weight", numbers, experts).removesuffix(".weight"), module


def weights_of(model: Model) -> Shards:
    """Canonical module name -> this rank's shard of its weight, for every linear that a format may quantize."""
    return shards_of(model).named(lambda name: name.removesuffix(".weight") if is_linear_weight(name) else None)


def whole_of(model: Model) -> set[str]:
    """Canonical names of the linears that every rank holds whole here, though other layer specs cut them."""
    config = chunks_of(model)[0].config
    if not config.multi_latent_attention:
        return set()
    rows = {
        "linear_q_down_proj": config.q_lora_rank,
        "linear_kv_down_proj": config.kv_lora_rank + config.qk_pos_emb_head_dim,
    }
    shapes = weights_of(model).shapes
    return {name for name, shape in shapes.items() if rows.get(name.rpartition(".")[2]) == shape[0]}


def grouped_weights(module: nn.Module) -> list[Tensor]:
    """The weights of a module that holds those of all local experts, as Transformer Engine's does; of others, none."""
    return [getattr(module, f"weight{number}") for number in range(getattr(module, "num_gemms", 0))]


def experts_of(model: Model) -> dict[str, nn.Module]:
    """Canonical name of a layer's experts -> its `MoELayer`, whose `experts` are called with (tokens sorted by expert,
    how many tokens each local expert has, the probability of each token).
    """
    layers = [pair for chunk in chunks_of(model) for pair in layers_of(chunk)]
    return {f"decoder.layers.{n}.mlp.experts": one.mlp for n, one in layers if _has_experts(one)}


def _has_experts(layer: nn.Module) -> bool:
    return hasattr(getattr(layer, "mlp", None), "experts")


def given_to_experts(layer: nn.Module, tokens: Tensor) -> Callable[[int], Tensor]:
    """Global number of an expert of a `MoELayer` -> its input for `tokens` [tokens, hidden]; for Llama 4, times its scores."""
    if not layer.config.moe_apply_probs_on_input:
        given = layer.fc1_latent_proj(tokens)[0] if layer.config.moe_latent_size else tokens
        return lambda expert: given
    scores = layer.router.gating(tokens).float().sigmoid().to(tokens.dtype)
    return lambda expert: tokens * scores[:, expert, None]


def embeddings_of(model: Model) -> list[nn.Module]:
    """The modules whose outputs are what the first layers of this rank read, and those that predict one more token."""
    return [chunk.embedding for chunk in chunks_of(model) if getattr(chunk, "embedding", None) is not None]


def local_experts_of(model: Model) -> list[int]:
    """The global numbers of this rank's experts, the same in every layer that has any; [] without experts."""
    layers = (layer for chunk in chunks_of(model) for _, layer in layers_of(chunk))
    return next((list(layer.mlp.local_expert_indices) for layer in layers if _has_experts(layer)), [])


def heads_of(model: Model) -> QKV:
    """How a model's fused q, k and v are laid out; known on every rank, also on one without layers."""
    config = chunks_of(model)[0].config
    return QKV(
        config.num_attention_heads // config.num_query_groups, config.kv_channels, bool(config.attention_output_gate)
    )


def layouts_of(model: Model) -> dict[str, Layout]:
    """Canonical module name -> how its output rows are laid out, for every linear of this rank."""
    layouts, config = {}, chunks_of(model)[0].config
    for name in weights_of(model):
        if makes_keys(f"{name}.weight"):
            layouts[name] = heads_of(model)
        elif name.endswith("linear_fc1") and config.gated_linear_unit:
            layouts[name] = Split(("gate", "up"))
        else:
            layouts[name] = Identity()
    return layouts


def attentions_of(model: Model) -> dict[str, nn.Module]:
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
    """What a linear multiplies with its weight, [..., in], given what the module was called with, before a norm that it contains.

    `ExportError` if that is another norm than RMSNorm.
    """
    if not hasattr(module, "layer_norm_weight"):
        return hidden
    if module.normalization != "RMSNorm":
        raise ExportError(f"calibration of a fused {module.normalization} is not supported; only RMSNorm is")
    if module.zero_centered_gamma:
        return zero_centred_norm(hidden, module.layer_norm_weight, module.eps)
    return torch.rms_norm(hidden, hidden.shape[-1:], module.layer_norm_weight, module.eps)


def zero_centred_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm that multiplies by 1 more than `weight`, in float32: bfloat16 has no numbers between 1 and 1 + 2^-7."""
    return torch.rms_norm(hidden.float(), hidden.shape[-1:], 1 + weight.float(), eps).type_as(hidden)


def unwrapping(chunk: nn.Module) -> Iterator[nn.Module]:
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

    There a layer is one block: * attention, G linear attention, M Mamba, - an MLP, E experts.
    """
    pattern = getattr(chunk, "hybrid_layer_pattern", None) or getattr(chunk, "hybrid_override_pattern", None)
    if pattern is None:
        return None
    kinds = pattern.partition("/")[0].replace("|", "")  # behind / are those that predict one more token
    if unknown := sorted(set(kinds) - set(LETTERS.values())):
        raise ExportError(
            f"a {type(chunk).__name__} with the layers {pattern!r}: what {unknown[0]!r} is, is not known. Known are "
            + ", ".join(f"{letter} ({kind.value})" for kind, letter in LETTERS.items())
        )
    return kinds


def blocks_per_layer(pattern: str | None) -> int:
    """How many of Megatron's layers make one of HF's: two where all are pairs of attention and MLP or experts."""
    return 2 if pattern and re.fullmatch(r"([*G][-E])+", pattern) else 1


def _layer_numbers(chunk: nn.Module) -> dict[str, list[int]]:
    per_layer, predicting = blocks_per_layer(pattern_of(chunk)), list(_predicting(chunk))
    inner = len(_inner_layers(predicting[0])) if predicting else 1
    first = [chunk.config.num_layers // per_layer + (outer.layer_number - 1) * inner for outer in predicting]
    return {
        "decoder": [(layer.layer_number - 1) // per_layer for layer in chunk.decoder.layers],
        "mtp": first,
        "last": [number + inner - 1 for number in first],
    }


def _inner_layers(outer: nn.Module) -> list[nn.Module]:
    """The layers inside one that predicts one more token: one, or several of a hybrid's."""
    inner = getattr(outer, "transformer_layer", None) or outer.mtp_model_layer
    return list(getattr(inner, "layers", [inner]))


def layers_of(chunk: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The global number of each transformer layer of a chunk, and the layer."""
    numbers = _layer_numbers(chunk)
    yield from zip(numbers["decoder"], chunk.decoder.layers, strict=True)
    for first, outer in zip(numbers["mtp"], _predicting(chunk), strict=True):
        yield from enumerate(_inner_layers(outer), first)


def canonical_tensors(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a chunk or a draft, without those of adapters, quantizers, and drafts in it."""
    check_delta_nets(chunk)
    numbers, experts = _layer_numbers(chunk), local_experts_of(chunk)
    for its_name, tensor in _all_tensors(chunk):
        if (name := without_additions(its_name)) is None or child_of(name):
            continue
        prefix, _, leaf = name.rpartition(".")
        if prefix.endswith("mlp.experts") and leaf in _LEGACY:  # [hidden, experts * 2 ffn], [experts * ffn, hidden]
            if kind := kind_of(tensor):
                raise ExportError(f"{its_name} is a {kind}: the experts of one tensor are read from a plain one only")
            stacked = tensor.view(len(experts), tensor.shape[0], -1) if leaf == "weight1" else tensor
            stacked = stacked.reshape(len(experts), -1, stacked.shape[-1])
            for number, weight in enumerate(stacked):
                yield canonical(f"{prefix}.{_LEGACY[leaf]}.weight{number}", numbers, experts), weight.T
        else:
            yield from without_beta_and_alpha(canonical(name, numbers, experts), tensor, chunk)


_LEGACY = {"weight1": "linear_fc1", "weight2": "linear_fc2"}  # of Megatron's grouped GEMM without Transformer Engine


def _all_tensors(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from chunk.named_parameters()
    for prefix, module in chunk.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
