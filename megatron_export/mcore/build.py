"""An HF config becomes a Megatron-Core model on this topology."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from ..common.errors import report
from ..common.optional import part
from ..distributed.topology import Topology
from ..models import Rope, architecture_of, check_computed, rope_of, settings_of, shape_of, unscaled_rope_settings
from ..models.hf_config import text_of
from ..planning.rank_placement import PAD_VOCAB_TO, layout_problems, size_problems, stages_of
from .cpu_compat import kernels, without_cuda
from .latent_attention import LatentAttention
from .linear_attention import delta_net
from .model import ACTIVATIONS, zero_centred_norm
from .norms_of_all_heads import norm_all_heads
from .sandwich import norm_outputs, sandwich
from .sparse_attention import SparseAttention, add_indexers


def check_divides(config: dict, topology: Topology, pp_layout: str | None = None) -> None:
    """`ExportError` unless heads, groups, sizes and experts divide by this topology, and its stages hold the layers."""
    shape, stages = shape_of(config), topology.pp_size * topology.vpp_size
    problems = size_problems(config, tp=topology.tp_size, etp=topology.experts.size, ep=topology.ep_size)
    if shape.kv_lora and not shape.q_lora and find_spec("megatron.core.transformer.mla_qk_norm_config"):
        problems.append(
            "q_lora_rank is null: this Megatron-Core norms queries that are made in one step, HF does not. Use megatron-core 0.16"
        )
    if topology.vpp_size > 1 and _is_hybrid(config):
        problems.append(
            f"--vpp {topology.vpp_size}: Megatron-Core cuts no hybrid model into virtual stages. Leave it out"
        )
    report(problems + layout_problems(config, stages, pp_layout))


def _is_hybrid(config: dict) -> bool:
    """Whether every layer is one block, so that Megatron has a hybrid model of it."""
    return "hybrid_layer_pattern" in settings_of(config)


def _hybrids() -> ModuleType:
    """The module that builds hybrid models: Megatron-Core's Mamba imports triton, which before 0.19 no other model needs."""
    return part("mcore.hybrid")


def build_model(
    config: dict,
    topology: Topology,
    *,
    max_sequence_length: int | None,
    dtype: torch.dtype = torch.bfloat16,
    initialize: bool = False,
    pp_layout: str | None = None,
) -> LanguageModule | list[LanguageModule]:
    """This rank's part of a `GPTModel` or a hybrid model (local spec, no fusions) for config.json's dict; a list of chunks with
    virtual stages.

    max_sequence_length  tokens; None: the model holds weights but cannot run, and may have a rope scaling that Megatron-Core lacks
    initialize           make up weights; otherwise they are left as allocated
    pp_layout            what each stage holds, as Megatron spells it; None: as even as the layers allow
    `ExportError` for sizes that this topology does not divide.
    """
    check_divides(config, topology, pp_layout)
    shape = shape_of(config)
    rope = Rope(unscaled_rope_settings(config))
    if max_sequence_length:
        check_computed(config, max_sequence_length)
        rope = rope_of(config)
    settings = _settings(config, topology, dtype, initialize, pp_layout)
    local_base = architecture_of(config).sandwiched
    for name, value in rope.yarn.items():
        setattr(settings, name, value)
    padding = PAD_VOCAB_TO * topology.tp_size
    chunks = []
    vocab = -(-shape.vocab // padding) * padding
    with without_cuda(topology.device), _norms_of_parts():
        if _is_hybrid(config):
            stages = stages_of(shape, topology.pp_size, pp_layout)
            model = _hybrids().hybrid_model(settings, shape, stages, vocab, max_sequence_length or 1)
            return _converted(model, topology.device, dtype)
        for chunk in range(topology.vpp_size):
            stage = chunk if topology.vpp_size > 1 else None
            model = GPTModel(
                config=settings,
                transformer_layer_spec=_layer_spec(settings, stage, sandwiched=bool(local_base)),
                vocab_size=vocab,
                max_sequence_length=max_sequence_length or 1,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                share_embeddings_and_output_weights=shape.tied,
                vp_stage=stage,
                mtp_block_spec=_mtp_spec(settings, stage),
                **rope.arguments,
            )
            _rotate_as_hf(model, rope.llama3)
            add_indexers(model, shape)
            norm_all_heads(model, config)
            if local_base:
                sandwich(model, local_base(text_of(config)))
            chunks.append(_converted(model, topology.device, dtype))
    return chunks if topology.vpp_size > 1 else chunks[0]


def _layer_spec(settings: TransformerConfig, stage: int | None, sandwiched: bool) -> TransformerBlockSubmodules:
    """The layers of a stage. Their final norm is named here: of layers alone, Megatron takes Transformer Engine's or Apex's, and
    Apex's refuses RMSNorm.
    """
    with mock.patch.object(gpt_layer_specs, "get_gpt_decoder_layer_specs", _layer_specs):
        spec = get_gpt_decoder_block_spec(
            settings,
            use_transformer_engine=False,
            normalization="RMSNorm",
            qk_l2_norm=settings.qk_l2_norm,
            vp_stage=stage,
        )
    for layer in spec.layer_specs:
        _with_attention(layer, settings)
        if sandwiched:
            norm_outputs(layer)
    return replace(spec, layer_norm=WrappedTorchNorm)


def _layer_specs(settings: TransformerConfig, *args: Any, **kwargs: Any) -> list[ModuleSpec]:
    """Megatron's own, with linear attention where it has that with Transformer Engine only."""
    specs = list(_attending_specs(settings, *args, **kwargs))
    for number, linear in enumerate(settings.linear_attention_freq or ()):
        if linear:
            specs[number] = copy(specs[number])
            specs[number].submodules = replace(specs[number].submodules, self_attention=delta_net())
    return specs


def _attending_specs(settings: TransformerConfig, *args: Any, **kwargs: Any) -> list[ModuleSpec]:
    """Megatron's own specs of layers, all of them with attention."""
    plain = copy(settings)
    plain.experimental_attention_variant = None
    return get_gpt_decoder_layer_specs(plain, *args, **kwargs)


def _mtp_spec(settings: TransformerConfig, stage: int | None) -> MultiTokenPredictionBlockSubmodules | None:
    if not settings.mtp_num_layers:
        return None
    last = _attending_specs(settings, use_transformer_engine=False, normalization="RMSNorm")[-1]
    last = _with_attention(last, settings)
    block = get_gpt_mtp_block_spec(settings, last, use_transformer_engine=False, vp_stage=stage)
    for layer in block.layer_specs if block else ():
        norms = dict.fromkeys(("enorm", "hnorm", "layer_norm"), WrappedTorchNorm)
        layer.submodules = replace(layer.submodules, **norms)
    return block


def _with_attention(layer: ModuleSpec, settings: TransformerConfig) -> ModuleSpec:
    if settings.multi_latent_attention:
        sparse = settings.experimental_attention_variant == "dsa"
        kind = SparseAttention if sparse else LatentAttention
        layer.submodules.self_attention.submodules.core_attention = kind
    return layer


def _rotate_as_hf(model: GPTModel, scaling: dict) -> None:
    """Scale rotary embeddings with HF's constants, and remove the norm of queries and keys where they are not rotated (Llama 4)."""
    if scaling:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)
    for layer in model.decoder.layers:
        if model.config.no_rope_freq and model.config.no_rope_freq[layer.layer_number - 1]:
            layer.self_attention.q_layernorm = layer.self_attention.k_layernorm = IdentityOp()


def _converted(model: LanguageModule, device: torch.device, dtype: torch.dtype) -> LanguageModule:
    """The model in `dtype`, but for buffers that Megatron itself keeps in another, such as the biases of routers."""
    kept = {name: buffer.dtype for name, buffer in model.named_buffers()}
    model = model.to(device=device, dtype=dtype)
    for name, was in kept.items():
        module, _, leaf = name.rpartition(".")
        holder = model.get_submodule(module)
        setattr(holder, leaf, getattr(holder, leaf).to(was))
    return model


@contextmanager
def _norms_of_parts() -> Iterator[None]:
    """Let torch's norm be built under sequence parallelism, which Megatron refuses for the gradients of its weight, and the same
    norm zero-centred, which Megatron has in Transformer Engine's only.
    """
    made = WrappedTorchNorm.__new__

    def make(kind: type, config: TransformerConfig, *args: Any, **kwargs: Any) -> torch.nn.Module:
        config = copy(config)
        centred, config.layernorm_zero_centered_gamma = config.layernorm_zero_centered_gamma, False
        config.sequence_parallel = False
        norm = made(kind, config, *args, **kwargs)
        return ZeroCentredNorm(norm.normalized_shape, norm.eps) if centred else norm

    with mock.patch.object(WrappedTorchNorm, "__new__", make):
        yield


class ZeroCentredNorm(torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 more than its weight."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return zero_centred_norm(hidden, self.weight, self.eps)


def _settings(
    config: dict, topology: Topology, dtype: torch.dtype, initialize: bool, pp_layout: str | None
) -> TransformerConfig:
    shape = shape_of(config)
    stages = topology.pp_size * topology.vpp_size
    if pp_layout is None and shape.layers % stages:
        pp_layout = "|".join(stages_of(shape, stages, None))
    if pp_layout and _is_hybrid(config):  # whose layers that predict are none of Megatron's
        pp_layout = None if _hybrids().MARKED else pp_layout.replace("m", "")
    kind = MLATransformerConfig if shape.kv_lora else TransformerConfig
    computed = settings_of(config)
    if computed.pop("hybrid_layer_pattern", None):  # an argument of hybrid models
        computed.pop("mtp_num_layers", None)
    computed["activation_func"] = ACTIVATIONS[computed["activation_func"]]
    experts = {"moe_token_dispatcher_type": "allgather", "moe_router_load_balancing_type": "none"}
    if computed.get("moe_router_enable_expert_bias"):  # whose scores HF computes in float32
        experts["moe_router_dtype"] = "fp32"
    return kind(
        **computed,
        **(experts if shape.experts else {}),
        deterministic_mode=bool(shape.delta) and not kernels.HAVE_FLA,  # linear attention in plain torch
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=topology.vpp_size if topology.vpp_size > 1 else None,
        pipeline_model_parallel_layout=pp_layout,
        expert_model_parallel_size=topology.ep_size,
        expert_tensor_parallel_size=topology.experts.size,
        # Otherwise every tensor-parallel rank would route a copy of each token, and the copies would drift apart.
        sequence_parallel=topology.tp_size > 1 and shape.experts > 0,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=topology.device.type == "cpu",
        perform_initialization=initialize,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )
