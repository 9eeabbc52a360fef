"""Nemotron-H and Nemotron 3: layers of one block each. They are built and calibrated without mamba_ssm; checkpoints are read with
the keys that Megatron-Core writes of what it builds with Transformer Engine alone: latents of experts, layers that predict.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_whole

from megatron_export import export_hf_checkpoint
from megatron_export.common.errors import ExportError
from megatron_export.models import parameters_of, settings_of, shape_of
from megatron_export.models.layer_kinds import LETTERS, Kind
from megatron_export.planning.plan import assumed
from megatron_export.verify.emulation import EmulatedLinear, load
from megatron_export.verify.thresholds import Wanted, inspected

from ..export.test_topologies import calibration_flags, export
from ..mcore.test_hybrid_model import PATTERN
from ..support.live import loaded, refusal
from ..support.models import assert_same, contents, make_model, read_json, tensors
from ..support.plans import plan_for
from ..support.predicting import add_nemotrons
from ..support.ranks import Ranks, command, living
from ..support.saving import PLACE, reading, save, without_weights

pytestmark = pytest.mark.whole

WIDE = {"hidden_size": 128, "intermediate_size": 128, "moe_shared_expert_intermediate_size": 128, "moe_latent_size": 64}
SEGMENTS = {"in_proj": ("z", "x", "B", "C", "dt"), "conv1d": ("x", "B", "C")}
FORMATS = {
    "bf16": (),
    "fp8": ("--kv-cache", "fp8"),
    "fp8_pb": (),
    "fp8_pc_pt": (),
    "nvfp4": (),
    "mixed": ("--set", "*.experts=nvfp4", "*.mixer.in_proj=fp8", "*.mixer.out_proj=mxfp8"),
}
MEASURED = ("fp8", "nvfp4", "mixed")
# of two ranks; the formats that differ there
TOPOLOGIES = {
    "tp2": (("--tp", 2), ("bf16", "fp8_pb", "fp8_pc_pt", "nvfp4", "mixed")),
    "pp2": (("--pp", 2, "--pp-layout", "Ettt|tttmmL"), ("bf16", "mixed")),
    "ep2": (("--ep", 2), ("bf16", "mixed")),
}


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
    """`nemotron_h` with latent experts and layers that predict, the checkpoint `saved` of it, and `hf` without weights."""
    base = tmp_path_factory.mktemp("nemotron")
    source = make_model(base, "nemotron_h", **WIDE)
    add_nemotrons(source)
    stored(source, base / "saved")
    without_weights(source, base / "hf")
    return base


@pytest.fixture(scope="module")
def alone(folder: Path, pool: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exports of one rank from the HF folder, and the statistics that they were made with."""
    out = tmp_path_factory.mktemp("alone")
    for form in FORMATS:
        measured = (*calibration_flags(folder / "nemotron_h"), "--save-calibration", out / f"{form}.safetensors")
        flags = measured if form in MEASURED else ()
        export(living(pool), 1, "--hf-model", folder / "nemotron_h", *asked(form), *flags, "--output", out / form)
    return out


def asked(form: str) -> tuple:
    return (*(() if form == "mixed" else ("--format", form)), *FORMATS[form])


def loading(form: str, alone: Path) -> tuple:
    return ("--load-calibration", alone / f"{form}.safetensors") if form in MEASURED else ()


def test_an_hf_folder_gives_every_byte_back(folder: Path, alone: Path) -> None:
    assert_same(tensors(alone / "bf16"), tensors(folder / "nemotron_h"))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_formats_have_the_same_bytes_on_every_topology(
    topology: str, folder: Path, alone: Path, ranks: Ranks, tmp_path: Path
) -> None:
    sizes, forms = TOPOLOGIES[topology]
    for form in forms:
        flags = ("--hf-model", folder / "nemotron_h", *asked(form), *loading(form, alone), *sizes)
        export(ranks, 2, *flags, "--output", tmp_path / form)
        assert_same(tensors(tmp_path / form), tensors(alone / form))
        assert contents(tmp_path / form) == contents(alone / form)


@pytest.mark.parametrize("sizes", [("--tp", 2), ("--ep", 2)], ids=str)
def test_a_checkpoint_has_the_same_bytes_without_a_model(
    sizes: tuple, folder: Path, alone: Path, ranks: Ranks, tmp_path: Path
) -> None:
    for form in ("bf16", "mixed"):
        flags = ("--hf-model", folder / "hf", "--megatron-checkpoint", folder / "saved", *asked(form), *sizes)
        said = export(ranks, 2, *flags, *loading(form, alone), "--output", tmp_path / form)
        assert "load " not in said  # no model was built
        assert_same(tensors(tmp_path / form), tensors(alone / form))


def test_a_dense_one_gives_every_byte_back(ranks: Ranks, tmp_path: Path) -> None:
    """As Nemotron-H, in stages that are not even."""
    kinds = ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]
    source = make_model(tmp_path, "nemotron_h", layers_block_type=kinds)
    for sizes in (("--tp", 2), ("--pp", 2)):
        out = tmp_path / sizes[0]
        export(ranks, 2, "--hf-model", source, "--format", "bf16", *sizes, "--output", out)
        assert_same(tensors(out), tensors(source))


def test_what_was_written_is_judged_sound_and_computes(folder: Path, alone: Path) -> None:
    """transformers' own model of it is emulated: experts without gates, and Mamba's projections."""
    ids = torch.randint(0, 500, (1, 20), generator=torch.Generator().manual_seed(0))
    for form in FORMATS:
        assert inspected(alone / form, folder / "nemotron_h", Wanted()).problems == [], form
    with torch.no_grad():
        expected = load(folder / "nemotron_h")(input_ids=ids).logits
        assert torch.equal(load(alone / "bf16")(input_ids=ids).logits, expected)
        emulated = load(alone / "fp8")
        found = emulated(input_ids=ids).logits
    assert 0 < (found - expected).norm() < 0.3 * expected.norm()
    linears = {name: module for name, module in emulated.named_modules() if isinstance(module, EmulatedLinear)}
    held = tensors(folder / "nemotron_h")
    for name, module in linears.items():
        weight = held[name.replace("model.", "backbone.") + ".weight"].float()
        assert (module.decoded() - weight).norm() < 0.05 * weight.norm()
    ends = {name.partition(".mixer.")[2] for name in linears}
    assert {"in_proj", "out_proj", "q_proj", "experts.3.up_proj", "shared_experts.down_proj", "down_proj"} <= ends


def test_projections_of_mamba_are_quantized_and_what_engines_leave_out_is_left_out(alone: Path) -> None:
    held = tensors(alone / "fp8")
    ignored = read_json(alone / "fp8" / "config.json")["quantization_config"]["ignore"]
    for module in ("0.mixer.in_proj", "0.mixer.out_proj", "1.mixer.experts.3.up_proj", "3.mixer.up_proj"):
        module = f"layers.{module}"
        assert held[f"backbone.{module}.weight"].dtype is torch.float8_e4m3fn
        assert f"backbone.{module}" not in ignored
    for module in ("0.mixer.conv1d", "1.mixer.gate", "1.mixer.fc1_latent_proj", "1.mixer.fc2_latent_proj"):
        module = f"layers.{module}"
        assert held[f"backbone.{module}.weight"].dtype is torch.bfloat16
        assert f"backbone.{module}" in ignored
    assert {"mtp.layers.0.eh_proj", "mtp.layers.0.mixer.q_proj", "mtp.layers.1.mixer.experts"} <= set(ignored)
    assert {name for name in held if name.endswith("k_scale")} == {"backbone.layers.2.mixer.k_proj.k_scale"}
    blocks = tensors(alone / "fp8_pb")  # where ranks have no whole blocks of in_proj
    assert blocks["backbone.layers.0.mixer.in_proj.weight"].dtype is torch.bfloat16
    assert blocks["backbone.layers.0.mixer.out_proj.weight"].dtype is torch.float8_e4m3fn


def test_layers_that_predict_can_be_dropped(folder: Path, ranks: Ranks, tmp_path: Path) -> None:
    flags = ("--hf-model", folder / "nemotron_h", "--format", "bf16", "--mtp", "drop")
    export(ranks, 1, *flags, "--output", tmp_path / "out")
    kept = {n: t for n, t in tensors(folder / "nemotron_h").items() if not n.startswith("mtp.")}
    assert_same(tensors(tmp_path / "out"), kept)
    assert read_json(tmp_path / "out" / "config.json")["num_nextn_predict_layers"] == 0


def export_and_save(source: Path, out: Path, sizes: dict) -> None:
    with loaded(source, **sizes) as (model, _):
        for form in ("bf16", "w4a16_nvfp4"):
            export_hf_checkpoint(model, out / form, hf_model=source, format=form)
        save(model, out / "saved", read_json(source / "config.json"))


@pytest.mark.parametrize("sizes", [{"tp": 1}, {"tp": 2}, {"pp": 2}, {"ep": 2}], ids=str)
def test_megatrons_own_hybrid_model_is_read_live_and_as_it_saves_itself(
    sizes: dict, ranks: Ranks, tmp_path: Path
) -> None:
    source = make_model(tmp_path, "nemotron_h", moe_latent_size=None)
    ranks.call(max(sizes.values()), export_and_save, source, tmp_path / "out", sizes)
    assert_same(tensors(tmp_path / "out" / "bf16"), tensors(source))
    without_weights(source, tmp_path / "out" / "hf")
    for form in ("bf16", "w4a16_nvfp4"):
        flags = (*reading(tmp_path / "out"), "--format", form, "--tp", 2)
        export(ranks, 2, *flags, "--output", tmp_path / form)
        assert_same(tensors(tmp_path / form), tensors(tmp_path / "out" / form))


def refused_pattern(built: Path, source: Path, out: Path, attribute: str | None) -> str:
    """In a rank: what an export of a model of the config `built` says of the one of `source`."""
    with loaded(built) as (model, _):
        if attribute:
            setattr(model, PATTERN, attribute)
        return refusal(export_hf_checkpoint, model, out, hf_model=source, format="bf16")


def test_a_live_pattern_that_contradicts_config_json_or_has_another_kind_is_refused(
    ranks: Ranks, tmp_path: Path
) -> None:
    source = make_model(tmp_path, "nemotron_h")
    kinds = read_json(source / "config.json")["layers_block_type"]
    other = make_model(tmp_path / "other", "nemotron_h", layers_block_type=[kinds[n] for n in (0, 1, 0, 3, 2, 1)])
    [said] = ranks.call(1, refused_pattern, other, source, tmp_path / "out", None)
    assert "the model has hybrid_layer_pattern = 'MEM-*E', but config.json means 'ME*-ME'" in said
    [said] = ranks.call(1, refused_pattern, source, source, tmp_path / "out", "ME*-MX")
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


def test_awq_is_refused(folder: Path) -> None:
    config = read_json(folder / "hf" / "config.json")
    with pytest.raises(ExportError, match="--format nvfp4_awq: squared ReLU does not pass a vector on"):
        plan_for(config, assumed(config, 1), format="nvfp4_awq")


def test_virtual_stages_are_refused_at_once(folder: Path, ranks: Ranks, tmp_path: Path) -> None:
    flags = (
        "--hf-model",
        folder / "nemotron_h",
        "--format",
        "bf16",
        "--pp",
        2,
        "--vpp",
        2,
        "--output",
        tmp_path / "out",
    )
    found = ranks.call(2, command, "--device", "cpu", *flags)
    assert [status for status, _ in found] == [1, 1]
    assert "--vpp 2: Megatron-Core cuts no hybrid model into virtual stages" in " ".join(found[0][1].split())
    assert list(tmp_path.iterdir()) == []
