"""Nemotron-H and Nemotron 3: layers of one block each. Megatron-Core's own modules where a CPU can hold them (Mamba's need a kernel
to run, not to be saved), and checkpoints with the keys that it writes of the rest: latents of experts, layers that predict.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm import mamba_context_parallel, mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_whole

from megatron_export import export_hf_checkpoint
from megatron_export.common.errors import ExportError
from megatron_export.distributed.topology import Topology
from megatron_export.mcore.build import _converted, _norms_of_parts, _settings
from megatron_export.mcore.cpu_compat import without_cuda
from megatron_export.mcore.load_hf import load_hf_weights
from megatron_export.mcore.parallel_state import current
from megatron_export.models import parameters_of, settings_of, shape_of
from megatron_export.models.layer_kinds import LETTERS, Kind
from megatron_export.planning.plan import assumed
from megatron_export.verify.thresholds import Wanted, inspected

from ..export.test_topologies import export
from ..mcore.test_hybrid_model import PATTERN, STACK_SPEC, HybridModel, HybridStack, HybridStackSubmodules
from ..support.live import refusal, world
from ..support.models import LENGTH, assert_same, contents, make_model, read_json, tensors
from ..support.plans import plan_for
from ..support.predicting import add_nemotrons
from ..support.ranks import Ranks, command, living
from ..support.saving import PLACE, reading, save, without_weights

pytestmark = pytest.mark.whole

SEGMENTS = {"in_proj": ("z", "x", "B", "C", "dt"), "conv1d": ("x", "B", "C")}
FORMATS = {
    "bf16": (),
    "fp8": ("--input-scale", 1),
    "fp8_pc_pt": (),
    "mxfp8": (),
    "nvfp4": ("--input-scale", 1),
    "w4a16_nvfp4": (),
    "mixed": ("--input-scale", 1, "--set", "*.experts=nvfp4", "*.mixer.in_proj=fp8", "*.mixer.out_proj=fp8"),
}
TOPOLOGIES = {"tp2": ("--tp", 2), "pp2": ("--pp", 2), "ep2": ("--ep", 2)}


def key_of(canonical: str, layers: int, kinds: tuple) -> str:
    """What Megatron-Core calls a parameter in a checkpoint of a hybrid model."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", canonical)
    if not found:
        return canonical.replace("decoder.final_layernorm", "decoder.final_norm")
    number, local = int(found[1]), found[2]
    if Kind.MAMBA in kinds[number]:
        local = local.replace("input_layernorm", "norm")
    local = re.sub(r"mlp\.experts\.(\d+)\.", r"mlp.experts.experts.\1.", local)
    if number < layers:
        return f"decoder.layers.{number}.{local}"
    outer = local.startswith(("enorm", "hnorm", "eh_proj", "final_layernorm"))
    return f"mtp.layers.0.{local}" if outer else f"mtp.layers.0.mtp_model_layer.layers.{number - layers}.{local}"


def stored(source: Path, folder: Path) -> None:
    """The checkpoint that Megatron-Core would save of the model, each tensor whole; rows of segments in a tensor each."""
    config, held, state = read_json(source / "config.json"), tensors(source), {}
    shape = shape_of(config)
    rows = {"in_proj": shape.mamba.segments, "conv1d": shape.mamba.convolved}
    for canonical, parameter in parameters_of(config).items():
        names = parameter.names()
        if len(names) == 3:  # q, k and v of each group, written out here: groups, then queries, key, value
            q, k, v = (held[name].unflatten(0, (shape.groups, -1)) for name in names.values())
            whole = torch.cat([q, k, v], dim=1).flatten(0, 1)
        else:
            [whole] = [held[name] for name in names.values()]
        key = key_of(canonical, shape.layers, shape.kinds)
        module = canonical.split(".")[-2]
        if ".mixer." in canonical and module in rows:
            parts = zip(SEGMENTS[module], whole.split(rows[module]), strict=True)
            state |= {f"{key}.{name}": part.clone() for name, part in parts}
        else:
            state[key] = whole.clone()
    place = folder / PLACE
    place.mkdir(parents=True)
    save_whole(state, storage_writer=FileSystemWriter(place), no_dist=True)
    (place / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` with latent experts and layers that predict, the checkpoint `saved`, and `hf` without weights."""
    base = tmp_path_factory.mktemp("nemotron")
    source = make_model(base, "nemotron_h", moe_latent_size=32)
    add_nemotrons(source)
    stored(source, base / "saved")
    without_weights(source, base / "hf")
    return base


@pytest.fixture(scope="module")
def alone(folder: Path, pool: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exports of one rank."""
    out = tmp_path_factory.mktemp("alone")
    for form, more in FORMATS.items():
        export(living(pool), 1, *given(folder, form), *more, "--output", out / form)
    return out


def given(folder: Path, form: str) -> tuple:
    flags = ("--hf-model", folder / "hf", "--megatron-checkpoint", folder / "saved")
    return flags if form == "mixed" else (*flags, "--format", form)


def test_a_checkpoint_gives_every_byte_back(folder: Path, alone: Path) -> None:
    assert_same(tensors(alone / "bf16"), tensors(folder / "nemotron_h"))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_format_has_the_same_bytes_on_every_topology(
    topology: str, folder: Path, alone: Path, ranks: Ranks, tmp_path: Path
) -> None:
    for form, more in FORMATS.items():
        export(ranks, 2, *given(folder, form), *more, *TOPOLOGIES[topology], "--output", tmp_path / form)
        assert_same(tensors(tmp_path / form), tensors(alone / form))
        assert contents(tmp_path / form) == contents(alone / form)


def test_what_was_written_is_judged_sound(folder: Path, alone: Path) -> None:
    for form in FORMATS:
        assert inspected(alone / form, folder / "nemotron_h", Wanted()).problems == [], form


def test_projections_of_mamba_are_quantized_and_what_engines_leave_out_is_left_out(alone: Path) -> None:
    held, ignored = (
        tensors(alone / "fp8"),
        read_json(alone / "fp8" / "config.json")["quantization_config"]["ignore"],
    )
    for module in (
        "layers.0.mixer.in_proj",
        "layers.0.mixer.out_proj",
        "layers.1.mixer.experts.3.up_proj",
        "layers.3.mixer.up_proj",
    ):
        assert held[f"backbone.{module}.weight"].dtype is torch.float8_e4m3fn
        assert f"backbone.{module}" not in ignored
    left = (
        "layers.0.mixer.conv1d",
        "layers.1.mixer.gate",
        "layers.1.mixer.fc1_latent_proj",
        "layers.1.mixer.fc2_latent_proj",
    )
    for module in left:
        assert held[f"backbone.{module}.weight"].dtype is torch.bfloat16
        assert f"backbone.{module}" in ignored
    assert {"mtp.layers.0.eh_proj", "mtp.layers.0.mixer.q_proj", "mtp.layers.1.mixer.experts"} <= set(ignored)


def test_layers_that_predict_can_be_dropped(folder: Path, ranks: Ranks, tmp_path: Path) -> None:
    export(ranks, 1, *given(folder, "bf16"), "--mtp", "drop", "--output", tmp_path / "out")
    kept = {n: t for n, t in tensors(folder / "nemotron_h").items() if not n.startswith("mtp.")}
    assert_same(tensors(tmp_path / "out"), kept)
    assert read_json(tmp_path / "out" / "config.json")["num_nextn_predict_layers"] == 0


class GatedNorm(nn.Module):
    """Where Mamba's norm is Triton's alone: its weight, saved as Megatron-Core saves it."""

    def __init__(self, size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state, group = self.state_dict(prefix="", keep_vars=True), parallel_state.get_tensor_model_parallel_group()
        more = {"tp_group": group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **more)


def build(config: dict, here: Topology, pattern: str) -> nn.Module:
    """Megatron-Core's own hybrid model with the local spec's linears."""
    settings = _settings(config, here, torch.bfloat16, initialize=False, pp_layout=None)
    settings.hidden_dropout = 0.0

    def whole(experts: int | None) -> TransformerLayerSubmodules:
        return get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm").submodules

    attention = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm, self_attention=whole(None).self_attention, self_attn_bda=get_bias_dropout_add
    )

    def feeding(experts: int | None) -> TransformerLayerSubmodules:
        return TransformerLayerSubmodules(
            pre_mlp_layernorm=WrappedTorchNorm, mlp=whole(experts).mlp, mlp_bda=get_bias_dropout_add
        )

    mixer = mamba_mixer.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(mamba_mixer.MambaMixer, submodules=mixer),
        mamba_bda=get_bias_dropout_add,
    )
    stack = HybridStackSubmodules(
        mamba_layer=ModuleSpec(MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(MLPLayer, submodules=feeding(None)),
        moe_layer=ModuleSpec(TransformerLayer, submodules=feeding(settings.num_moe_experts)),
    )
    kernels = {"HAVE_MAMBA_SSM": True, "HAVE_EINOPS": True, "ExtendedRMSNorm": GatedNorm}
    with (
        without_cuda(),
        _norms_of_parts(),
        mock.patch(f"{HybridStack.__module__}.TENorm", WrappedTorchNorm),
        mock.patch.multiple(mamba_mixer, **kernels),
        mock.patch.object(mamba_context_parallel, "HAVE_EINOPS", True),
    ):
        model = HybridModel(
            settings,
            vocab_size=512,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=False,
            **{STACK_SPEC: ModuleSpec(module=HybridStack, submodules=stack), PATTERN: pattern},
        )
        return _converted(model, here.device, torch.bfloat16)


@contextmanager
def live(source: Path, pattern: str | None = None, **sizes: int) -> Iterator[nn.Module]:
    """In a rank: such a model with the weights of `source`."""
    config = read_json(source / "config.json")
    meant = settings_of(config)["hybrid_layer_pattern"]
    with world(**sizes), current() as here:
        model = build(config, here, pattern or meant)
        if pattern is None:
            load_hf_weights(model, source, config, here)
        yield model


def export_and_save(source: Path, out: Path, sizes: dict) -> None:
    with live(source, **sizes) as model:
        for form in ("bf16", "w4a16_nvfp4"):
            export_hf_checkpoint(model, out / form, hf_model=source, format=form)
        save(model, out / "saved", read_json(source / "config.json"))


@pytest.mark.parametrize("sizes", [{"tp": 1}, {"tp": 2}, {"pp": 2}, {"ep": 2}], ids=str)
def test_megatrons_own_hybrid_model_is_read_live_and_as_it_saves_itself(
    sizes: dict, ranks: Ranks, tmp_path: Path
) -> None:
    source = make_model(tmp_path, "nemotron_h")
    ranks.call(max(sizes.values()), export_and_save, source, tmp_path / "out", sizes)
    assert_same(tensors(tmp_path / "out" / "bf16"), tensors(source))
    without_weights(source, tmp_path / "out" / "hf")
    for form in ("bf16", "w4a16_nvfp4"):
        flags = (*reading(tmp_path / "out"), "--format", form, "--tp", 2)
        export(ranks, 2, *flags, "--output", tmp_path / form)
        assert_same(tensors(tmp_path / form), tensors(tmp_path / "out" / form))


def refused_pattern(source: Path, out: Path, pattern: str, attribute: str | None) -> str:
    with live(source, pattern) as model:
        if attribute:
            setattr(model, PATTERN, attribute)
        return refusal(export_hf_checkpoint, model, out, hf_model=source, format="bf16")


def test_a_live_pattern_that_contradicts_config_json_or_has_another_kind_is_refused(
    ranks: Ranks, tmp_path: Path
) -> None:
    source = make_model(tmp_path, "nemotron_h")
    [said] = ranks.call(1, refused_pattern, source, tmp_path / "out", "MEM-*E", None)
    assert "the model has hybrid_layer_pattern = 'MEM-*E', but config.json means 'ME*-ME'" in said
    [said] = ranks.call(1, refused_pattern, source, tmp_path / "out", "ME*-ME", "ME*-MX")
    assert "what 'X' is, is not known. Known are M (Mamba), * (attention)" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers_block_type": ["mamba", "sparse"]},
            "layers_block_type has a layer 'sparse', which",
        ),
        ({"layers_block_type": None, "hybrid_override_pattern": "MEX"}, "hybrid_override_pattern has a layer 'X'"),
        ({"num_hidden_layers": 5}, "its pattern has 6 layers, and num_hidden_layers is 5"),
        ({"ssm_state_size": None}, "a model with layers of Mamba lacks ssm_state_size"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu' is not supported"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict, message: str, folder: Path) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        parameters_of(read_json(folder / "hf" / "config.json") | changes)


def test_a_pattern_is_read_in_all_its_spellings(folder: Path) -> None:
    config = read_json(folder / "hf" / "config.json")
    words = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    letters = "".join(words[kind] for kind in config["layers_block_type"])
    without = {key: value for key, value in config.items() if key not in ("layers_block_type", "num_hidden_layers")}
    assert list(parameters_of(without | {"hybrid_override_pattern": letters})) == list(parameters_of(config))
    assert settings_of(config)["hybrid_layer_pattern"] == letters == "ME*-ME"
    assert set(LETTERS.values()) == {*letters, "G"}


def test_awq_and_blocks_of_fp8_are_refused(folder: Path) -> None:
    config = read_json(folder / "hf" / "config.json")
    for form, why in (("nvfp4_awq", "squared ReLU does not pass a vector on"), ("fp8_pb", "no engine loads it")):
        with pytest.raises(ExportError, match=f"--format {form}: {why}"):
            plan_for(config, assumed(config, 1), format=form)


def test_no_model_of_it_is_built_and_the_way_out_is_told(folder: Path, ranks: Ranks, tmp_path: Path) -> None:
    flags = ("--hf-model", folder / "nemotron_h", "--format", "bf16", "--output", tmp_path / "out")
    [(status, said)] = ranks.call(1, command, "--device", "cpu", *flags)
    assert status == 1
    assert "this command builds no model of them" in " ".join(said.split())
    assert list(tmp_path.iterdir()) == []
