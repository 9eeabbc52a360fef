"""Megatron's hybrid model, in which every layer is one block: its layers are made of the local spec's modules and of a mixer that
needs no mamba_ssm; layers that predict one more token hold their weights, and are not run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn

from ..models.layer_kinds import LETTERS, Kind
from ..models.shape import ModelShape
from .mamba import mixer

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    MARKED = True  # a pattern says where stages begin
except ImportError:  # megatron-core before 0.17
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules

    MARKED = False


def hybrid_model(
    settings: TransformerConfig, shape: ModelShape, stages: tuple[str, ...], vocab: int, length: int
) -> nn.Module:
    """This rank's part of the model.

    settings  its own. They count the layers that predict when it is built: Megatron would build its own
    stages    what each pipeline stage holds, in the letters of `stages_of`
    vocab     rows of the embedding, padded
    """
    kinds = [LETTERS[kinds[0]] for kinds in shape.kinds]
    main, predicting = kinds[: shape.layers], kinds[shape.layers :]
    depths = len(shape.having(Kind.JOIN)) or None
    last = parallel_state.is_pipeline_last_stage()
    named = {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": last,
        "share_embeddings_and_output_weights": shape.tied,
        "position_embedding_type": "none",
        **_pattern(main, stages),
    }
    with _built_here():
        spec = _stack(settings, shape)
        model = HybridModel(settings, vocab_size=vocab, max_sequence_length=length, **{_SPEC: spec}, **named)
        if depths and last:
            inner = len(predicting) // depths
            outers = (
                Predicting(settings, spec.submodules, predicting[:inner], number) for number in range(1, depths + 1)
            )
            model.mtp = nn.Module()
            model.mtp.layers = nn.ModuleList(outers)
    settings.mtp_num_layers = depths
    return model


_SPEC = "hybrid_stack_spec" if MARKED else "mamba_stack_spec"


def _pattern(main: list[str], stages: tuple[str, ...]) -> dict[str, str]:
    """The kind of each layer, as an argument; with marks where stages begin, if Megatron reads them."""
    if not MARKED:
        return {"hybrid_override_pattern": "".join(main)}
    letters = iter(main)
    return {"hybrid_layer_pattern": "|".join("".join(next(letters) for one in held if one == "t") for held in stages)}


class Stack(HybridStack):
    """Megatron's own stack of layers, on any stage that the settings' layout means."""

    def _select_layers_for_pipeline_parallel(self, kinds: list[str]) -> tuple[int, list[str]]:
        """Where this stage begins, and its layers, of all layers. (Megatron-Core before 0.17 calls it.)"""
        first = get_transformer_layer_offset(self.config)
        return first, kinds[first : first + get_num_layers_to_build(self.config)]


def _stack(settings: TransformerConfig, shape: ModelShape) -> ModuleSpec:
    """What each kind of layer is made of."""

    def block(kind: type, experts: int | None, *parts: str, norm: str) -> ModuleSpec:
        whole = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm").submodules
        taken = {part: getattr(whole, part) for part in parts}
        return ModuleSpec(kind, submodules=TransformerLayerSubmodules(**taken, **{norm: WrappedTorchNorm}))

    mamba = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=mixer(shape.mamba.kernel if shape.mamba else 0, on_gpu=not settings.use_cpu_initialization),
        mamba_bda=get_bias_dropout_add,
    )
    feeding = {"norm": "pre_mlp_layernorm"}
    parts = HybridStackSubmodules(
        mamba_layer=ModuleSpec(MambaLayer, submodules=mamba),
        attention_layer=block(TransformerLayer, None, "self_attention", "self_attn_bda", norm="input_layernorm"),
        mlp_layer=block(MLPLayer, None, "mlp", "mlp_bda", **feeding),
        moe_layer=block(TransformerLayer, settings.num_moe_experts, "mlp", "mlp_bda", **feeding),
    )
    return ModuleSpec(Stack, submodules=parts)


@contextmanager
def _built_here() -> Iterator[None]:
    """Let torch's norm be the last one, and plain linears those to and from the latent of experts: Megatron takes Transformer
    Engine's, whatever the spec.
    """
    with (
        mock.patch(f"{HybridStack.__module__}.TENorm", WrappedTorchNorm),
        mock.patch.multiple(moe_layer, create=True, HAVE_TE=True, TELinear=WholeLinear),
    ):
        yield


class WholeLinear(nn.Linear):
    """A linear that every rank has whole, called as Megatron calls its own."""

    def __init__(self, size: int, outputs: int, *, config: TransformerConfig, **_: Any) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(size, outputs, bias=False, device=device, dtype=config.params_dtype)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return super().forward(hidden), None


class Predicting(nn.Module):
    """What predicts one more token: several layers, and what joins an embedding and a hidden state before them."""

    def __init__(
        self, settings: TransformerConfig, parts: HybridStackSubmodules, kinds: list[str], number: int
    ) -> None:
        super().__init__()
        self.layer_number = number
        norm = {"config": settings, "hidden_size": settings.hidden_size, "eps": settings.layernorm_epsilon}
        self.enorm, self.hnorm, self.final_layernorm = (WrappedTorchNorm(**norm) for _ in range(3))
        self.eh_proj = ColumnParallelLinear(
            2 * settings.hidden_size,
            settings.hidden_size,
            config=settings,
            init_method=settings.init_method,
            bias=False,
        )
        made = {LETTERS[Kind.MAMBA]: parts.mamba_layer, LETTERS[Kind.ATTENTION]: parts.attention_layer}
        made |= {LETTERS[Kind.MLP]: parts.mlp_layer, LETTERS[Kind.EXPERTS]: parts.moe_layer}
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.mtp_model_layer = nn.Module()
        self.mtp_model_layer.layers = nn.ModuleList(
            _layer(made[kind], settings, place, groups) for place, kind in enumerate(kinds, 1)
        )

    @property
    def transformer_layer(self) -> nn.Module:
        """The word of Megatron's schedules before 0.17, which number micro-batches there."""
        return self.mtp_model_layer


def _layer(spec: ModuleSpec, settings: TransformerConfig, place: int, groups: ProcessGroupCollection) -> nn.Module:
    return spec.module(config=settings, submodules=spec.submodules, layer_number=place, pg_collection=groups)
