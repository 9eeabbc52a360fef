"""Qwen3-Next and Qwen 3.5, most of whose layers have linear attention: bytes on every topology, Megatron-Core's own checkpoints,
and what is refused.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_export import export_hf_checkpoint
from megatron_export.checkpoint.original import config_alone
from megatron_export.common.errors import ExportError
from megatron_export.models import parameters_of, shape_of
from megatron_export.verify.emulation import EmulatedLinear, load
from megatron_export.verify.thresholds import Wanted, inspected

from ..export.test_topologies import calibration_flags, export
from ..support.live import loaded, refusal
from ..support.models import assert_same, contents, make_model, read_json, tensors
from ..support.predicting import add_qwens
from ..support.ranks import Ranks, command, living
from ..support.saving import PLACE, changing, reading, renamed, saved_model, without_weights

pytestmark = pytest.mark.whole

NAMES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
TOPOLOGIES = {"tp2": ("--tp", 2), "pp2": ("--pp", 2), "ep2": ("--ep", 2)}
FORMATS = {
    "bf16": (),
    "fp8": ("--kv-cache", "fp8"),
    "fp8_pb": (),
    "fp8_pc_pt": (),
    "mxfp8": (),
    "nvfp4_awq": ("--kv-cache", "fp8"),
    "w4a16_nvfp4": (),
    "int4_awq": ("--group-size", 64),
    "mixed": ("--recipe", "w4a16_nvfp4_mlp_fp8_attention"),
}

# The architectures share their rules of linear attention, so one of them is tried in every format.
TRIED = {
    "qwen3_next": ("bf16", "fp8", "nvfp4_awq"),
    "qwen3_5": ("bf16", "fp8", "mixed"),
    "qwen3_5_moe": tuple(FORMATS),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each with a layer that predicts one more token."""
    found = {}
    for name in NAMES:
        found[name] = make_model(tmp_path_factory.mktemp(name), name, **SIZES)
        add_qwens(found[name])
    return found


@pytest.fixture(scope="module")
def alone(sources: dict, pool: list, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By architecture, the exports of one rank, and the statistics that they were made with."""
    found = {}
    for name, source in sources.items():
        folder = found[name] = tmp_path_factory.mktemp(f"alone_{name}")
        for form in TRIED[name]:
            flags = ("--hf-model", source, *_form(form), *FORMATS[form], "--output", folder / form)
            kept = ("--save-calibration", folder / f"{form}.safetensors")
            export(living(pool), 1, *flags, *((*calibration_flags(source), *kept) if _measures(form) else ()))
    return found


def _form(form: str) -> tuple:
    return () if form == "mixed" else ("--format", form)


def _measures(form: str) -> bool:
    return form in ("fp8", "nvfp4_awq", "int4_awq", "mixed")


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_gives_every_byte_back_in_bfloat16(name: str, sources: dict, alone: dict) -> None:
    assert_same(tensors(alone[name] / "bf16"), tensors(sources[name]))


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_files_say_that_a_layer_predicts_where_config_json_does_not(name: str, sources: dict, tmp_path: Path) -> None:
    source = shutil.copytree(sources[name], tmp_path / "source")
    meant = read_json(source / "config.json")
    config = read_json(source / "config.json")
    del config.get("text_config", config)["mtp_num_hidden_layers"]
    (source / "config.json").write_text(json.dumps(config))
    assert config_alone(source, "keep", own=True).config == meant
    left = config_alone(source, "drop", own=True)
    assert (left.dropped, shape_of(left.config).mtp) == (("mtp.",), 0)


def test_what_qwen_3_5_publishes_in_float32_comes_back_to_the_bit(ranks: Ranks, tmp_path: Path) -> None:
    """Norms between 0.5 and 2, of which float32 has 1 less and 1 more without rounding."""
    source = make_model(tmp_path, "qwen3_5", **SIZES)
    held = tensors(source)
    wide = [name for name in held if name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))]
    made = held | {name: 0.6 + torch.rand(held[name].shape) for name in wide}
    save_file(made, source / "model.safetensors", {"format": "pt"})
    export(ranks, 2, "--hf-model", source, "--tp", 2, "--format", "fp8_pb", "--output", tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert_same({name: found[name] for name in wide}, {name: made[name] for name in wide})
    assert len(wide) == 2 * 2
    assert inspected(tmp_path / "out", source, Wanted()).problems == []


@pytest.mark.parametrize(
    ("name", "topology"),
    [(name, topology) for name in NAMES for topology in TOPOLOGIES if (name, topology) != ("qwen3_5", "ep2")],
)
def test_every_format_has_the_same_bytes_on_every_topology(
    name: str, topology: str, sources: dict, alone: dict, ranks: Ranks, tmp_path: Path
) -> None:
    for form in TRIED[name]:
        flags = (
            "--hf-model",
            sources[name],
            *_form(form),
            *FORMATS[form],
            *TOPOLOGIES[topology],
            "--output",
            tmp_path / form,
        )
        given = ("--load-calibration", alone[name] / f"{form}.safetensors") if _measures(form) else ()
        export(ranks, 2, *flags, *given)
        assert_same(tensors(tmp_path / form), tensors(alone[name] / form))
        assert contents(tmp_path / form) == contents(alone[name] / form)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_is_judged_sound(name: str, sources: dict, alone: dict) -> None:
    for form in TRIED[name]:
        found = inspected(alone[name] / form, sources[name], Wanted())
        assert found.problems == [], form


@pytest.mark.parametrize("name", NAMES)
def test_input_linears_of_linear_attention_are_quantized_and_what_engines_cannot_is_left_out(
    name: str, alone: dict
) -> None:
    held = tensors(alone[name] / "fp8")
    config = read_json(alone[name] / "fp8" / "config.json")
    prefix = "model." if name == "qwen3_next" else "model.language_model."
    linear = f"{prefix}layers.0.linear_attn."
    quantized, plain = (
        (("out_proj",), ("in_proj_qkvz", "in_proj_ba", "conv1d"))
        if name == "qwen3_next"
        else (("in_proj_qkv", "in_proj_z", "out_proj"), ("in_proj_b", "in_proj_a", "conv1d"))
    )
    ignored = config["quantization_config"]["ignore"]
    for module in quantized:
        assert held[f"{linear}{module}.weight"].dtype is torch.float8_e4m3fn
        assert f"{linear}{module}" not in ignored
    for module in plain:
        assert held[f"{linear}{module}.weight"].dtype is torch.bfloat16
        assert f"{linear}{module}" in ignored
    if name != "qwen3_next":  # engines join them
        assert torch.equal(held[f"{linear}in_proj_qkv.weight_scale"], held[f"{linear}in_proj_z.weight_scale"])
        assert "model.visual*" in ignored
    assert "mtp.fc" in ignored
    assert f"{prefix}layers.1.self_attn.k_proj.k_scale" in held
    assert not [key for key in held if key.startswith(linear) and "k_scale" in key]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
def test_megatrons_own_checkpoints_are_read(name: str, tp: int, sources: dict, ranks: Ranks, tmp_path: Path) -> None:
    """Saved by Megatron-Core's own `sharded_state_dict` at this TP, exported without a model."""
    ranks.call(tp, saved_model, sources[name], tmp_path / "saved", {"tp": tp})
    shutil.copytree(sources[name], tmp_path / "hf")
    for path in (tmp_path / "hf").glob("*.safetensors"):
        held = {n: t for n, t in load_file(path).items() if n.startswith("model.visual.")}
        path.unlink()
        if held:
            save_file(held, path)
    for sizes in (("--tp", 2), ("--pp", 2)):
        out = tmp_path / f"out{sizes[0]}"
        export(ranks, 2, *reading(tmp_path, "bf16"), *sizes, "--output", out)
        assert_same(tensors(out), tensors(sources[name]))


def test_a_checkpoint_whose_segments_are_not_told_apart_is_refused(sources: dict, ranks: Ranks, tmp_path: Path) -> None:
    """As ms-swift saves its own GatedDeltaNet, whose rows lie otherwise."""
    ranks.call(1, saved_model, sources["qwen3_next"], tmp_path / "saved", {})
    without_weights(sources["qwen3_next"], tmp_path / "hf")
    renamed(tmp_path / "saved" / PLACE, changing((r"(in_proj\.weight)\.query$", r"\1")))
    flags = (*reading(tmp_path, "bf16"), "--output", tmp_path / "out")
    [(status, said)] = ranks.call(1, command, "--device", "cpu", *flags)
    assert status == 1
    assert re.search(
        r"in_proj\.weight' is linear attention of another layout than Megatron-Core's", said.replace("\n", "")
    )


def of_another_class(source: Path, out: Path) -> str:
    """In a rank: what an export says of a model whose linear attention is of a class of the same name from elsewhere."""
    with loaded(source) as (model, _):
        module = model.decoder.layers[0].self_attention
        module.__class__ = type("GatedDeltaNet", (type(module),), {"__module__": "swift.megatron"})
        return refusal(export_hf_checkpoint, model, out, hf_model=source, format="bf16")


def test_linear_attention_of_another_class_is_refused_by_name(sources: dict, ranks: Ranks, tmp_path: Path) -> None:
    [said] = ranks.call(1, of_another_class, sources["qwen3_next"], tmp_path / "out")
    assert "decoder.layers.0.self_attention is a swift.megatron.GatedDeltaNet" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types has 'sliding_attention'"),
        ({"linear_num_key_heads": None}, "a model with layers of linear attention lacks linear_num_key_heads"),
        ({"linear_num_value_heads": 6}, "linear_num_value_heads 6 is not a multiple of linear_num_key_heads 4"),
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers = 2 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict, message: str, sources: dict) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        parameters_of(read_json(sources["qwen3_next"] / "config.json") | changes)


def test_layers_that_predict_can_be_dropped(sources: dict, ranks: Ranks, tmp_path: Path) -> None:
    for name, source in sources.items():
        export(ranks, 1, "--hf-model", source, "--format", "bf16", "--mtp", "drop", "--output", tmp_path / name)
        kept = {n: t for n, t in tensors(source).items() if not n.startswith("mtp.")}
        assert_same(tensors(tmp_path / name), kept)
        config = read_json(tmp_path / name / "config.json")
        assert config.get("text_config", config)["mtp_num_hidden_layers"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_emulated_as_transformers_computes_it(name: str, sources: dict, alone: dict) -> None:
    """In bfloat16 the same logits; in fp8 every linear of linear attention that is quantized has its own weight, rounded."""
    ids = torch.randint(0, 500, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(sources[name])(input_ids=ids).logits
        assert torch.equal(load(alone[name] / "bf16")(input_ids=ids).logits, expected)
        emulated = load(alone[name] / "fp8")
        assert emulated(input_ids=ids).logits.isfinite().all()
    held, inside = tensors(sources[name]), "model." if name == "qwen3_next" else "model.language_model."
    linears = {key: module for key, module in emulated.named_modules() if isinstance(module, EmulatedLinear)}
    for key, module in linears.items():
        weight = held[f"{inside}{key.removeprefix('model.')}.weight"].float()
        assert (module.decoded() - weight).norm() < 0.05 * weight.norm()
    wanted = set() if name == "qwen3_next" else {"in_proj_qkv", "in_proj_z"}  # SGLang takes no in_proj_qkvz in fp8
    found = {key.rpartition(".")[2] for key in linears}
    assert wanted | {"out_proj", "o_proj", "q_proj"} <= found
    assert not {"in_proj_qkvz", "in_proj_ba", "in_proj_a", "in_proj_b"} & found


def test_experts_that_are_published_in_stacks_are_read(sources: dict, ranks: Ranks, tmp_path: Path) -> None:
    """As Qwen 3.6 has them on disk, those that predict one more token too."""
    source = sources["qwen3_5_moe"]
    shutil.copytree(source, tmp_path / "stacked")
    held, kept = tensors(source), {}
    for name, tensor in held.items():
        if ".mlp.experts." not in name:
            kept[name] = tensor.clone()
            continue
        prefix = name.partition(".experts.")[0] + ".experts"
        each = {p: [held[f"{prefix}.{e}.{p}_proj.weight"] for e in range(4)] for p in ("gate", "up", "down")}
        both = [torch.cat(pair) for pair in zip(each["gate"], each["up"], strict=True)]
        kept |= {f"{prefix}.gate_up_proj": torch.stack(both), f"{prefix}.down_proj": torch.stack(each["down"])}
    assert {"mtp.layers.0.mlp.experts.gate_up_proj"} < kept.keys()
    save_file(kept, tmp_path / "stacked" / "model.safetensors")
    export(ranks, 2, "--hf-model", tmp_path / "stacked", "--format", "bf16", "--ep", 2, "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), held)
