"""Megatron's other kind of model: attention and MLP are layers of their own, and pairs of them are the layers of HF."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from megatron_export import calibrate, export_hf_checkpoint
from megatron_export.distributed.topology import Topology
from megatron_export.mcore.build import _settings
from megatron_export.mcore.cpu_compat import without_cuda
from megatron_export.mcore.load_hf import load_hf_weights

from ..support.live import batches, loaded, refusal
from ..support.models import LENGTH, assert_same, read_json, tensors
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    PATTERN, STACK_SPEC = "hybrid_layer_pattern", "hybrid_stack_spec"
except ImportError:  # megatron-core before 0.17
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules

    PATTERN, STACK_SPEC = "hybrid_override_pattern", "mamba_stack_spec"


def build_hybrid(source: Path, here: Topology, pattern: str) -> nn.Module:
    """The model of config.json in pairs of layers, with the local spec's modules."""
    config = read_json(source / "config.json")
    settings = _settings(config, here, torch.bfloat16, initialize=False, pp_layout=None)
    settings.num_layers *= 2
    whole = get_gpt_layer_local_spec(qk_layernorm=settings.qk_layernorm, normalization="RMSNorm").submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=whole.input_layernorm, self_attention=whole.self_attention, self_attn_bda=get_bias_dropout_add
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=whole.pre_mlp_layernorm, mlp=whole.mlp, mlp_bda=get_bias_dropout_add
    )
    stack = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    norm = f"{HybridStack.__module__}.TENorm"  # the last norm is Transformer Engine's, whatever the spec
    with without_cuda(), mock.patch(norm, WrappedTorchNorm):
        return HybridModel(
            settings,
            vocab_size=512,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=config["tie_word_embeddings"],
            position_embedding_type="rope",
            **{STACK_SPEC: ModuleSpec(module=HybridStack, submodules=stack), PATTERN: pattern},
        ).to(torch.bfloat16)


def export_both(source: Path, out: Path, tp: int, pp: int) -> None:
    """In a rank: calibrate and export a `GPTModel` and a `HybridModel` with the same weights."""
    with loaded(source, tp, pp) as (model, here):
        exported(model, source, out / "gpt")
        hybrid = build_hybrid(source, here, "*-" * 4)
        load_hf_weights(hybrid, source, read_json(source / "config.json"), here)
        exported(hybrid, source, out / "hybrid")


def exported(model: nn.Module, source: Path, out: Path) -> None:
    statistics = calibrate(model, batches(source), format="nvfp4_awq")
    for form in ("bf16", "nvfp4_awq"):
        export_hf_checkpoint(model, out / form, hf_model=source, format=form, calibration=statistics)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_pairs_of_layers_export_the_bytes_of_whole_ones(
    tp: int, pp: int, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    ranks.call(tp * pp, export_both, models["qwen3"], tmp_path, tp, pp)
    for form in ("bf16", "nvfp4_awq"):
        assert_same(tensors(tmp_path / "hybrid" / form), tensors(tmp_path / "gpt" / form))
    assert_same(tensors(tmp_path / "hybrid" / "bf16"), tensors(models["qwen3"]))


def export_with(source: Path, out: Path, pattern: str) -> str:
    """In a rank: what an export says of a model with this pattern."""
    with loaded(source) as (_, here):
        model = build_hybrid(source, here, "*-" * 4)
        setattr(model, PATTERN, pattern)
        return refusal(export_hf_checkpoint, model, out, hf_model=source, format="bf16")


def test_other_patterns_of_layers_and_another_number_of_them_are_refused(
    models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    (said,) = ranks.call(
        1, export_with, models["qwen3"], tmp_path / "out", "M-*-*-*-"
    )  # no pairs: each block is a layer
    assert "the model has num_layers = 8, but config.json means 4" in said
    (said,) = ranks.call(1, export_with, models["qwen3"], tmp_path / "out", "*X*-*-*-")
    assert "the layers '*X*-*-*-': what 'X' is, is not known" in said
    (said,) = ranks.call(1, export_with, models["qwen3"], tmp_path / "out", "*-" * 3)
    assert "the model has num_layers = 3, but config.json means 4" in said
    assert list(tmp_path.iterdir()) == []
