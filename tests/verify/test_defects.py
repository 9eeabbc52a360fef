"""Mistakes that exporters make, planted one at a time in a sound checkpoint: each is found, and the tensor is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_export.common.errors import ExportError
from megatron_export.verify.judge import judge

from ..support.exported import exported
from ..support.models import make_model, read_json, tensors

L0, L1, L2 = (f"model.layers.{layer}" for layer in range(3))
ATTENTION, MLP, EXPERTS = f"{L1}.self_attn", f"{L0}.mlp", f"{L1}.mlp.experts"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM 4.5: a dense layer, experts, a shared one, biases; as many keys as queries."""
    sizes = {"num_key_value_heads": 8, "head_dim": 8, "intermediate_size": 64, "num_hidden_layers": 3}
    return make_model(
        tmp_path_factory.mktemp("reference"), "glm4_moe", **sizes, vocab_size=192, moe_intermediate_size=64
    )


SETTINGS = {"nvfp4": {"kv_cache": "fp8"}, "nvfp4_awq": {}, "int4_awq": {"options": {"group_size": 64}}, "mxfp8": {}}
SETTINGS["fp8"] = {"kv_cache": "fp8", "kv_scale": 1.0, "input_scale": 0.5}


@pytest.fixture(scope="module")
def sound(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in each format, in several files."""
    folder = tmp_path_factory.mktemp("sound")
    for format, settings in SETTINGS.items():
        exported(reference, folder / format, format, max_shard_size=60_000, **settings)
    return {format: folder / format for format in SETTINGS}


def copied(sound: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """The same checkpoint, its tensors changed."""
    folder.mkdir()
    found = {name: tensor.clone() for name, tensor in tensors(sound).items()}
    for path in sound.glob("*.json"):
        if "index" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    change(found)
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, folder / "model.safetensors")
    return folder


def moved(found: Tensors, one: str, other: str) -> Tensors:
    """What one module has, or all below it, under the names of another."""
    return {other + name.removeprefix(one): tensor for name, tensor in found.items() if name.startswith(f"{one}.")}


def swapped(one: str, other: str) -> Callable[[Tensors], None]:
    """Two modules change places."""
    return lambda found: found.update(moved(found, one, other) | moved(found, other, one))


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda found: found.update({name: change(found[name]).clone()})


def dropped(name: str) -> Callable[[Tensors], None]:
    return lambda found: found.pop(name)


def raw(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8)


def first(value: float) -> Callable[[Tensor], Tensor]:
    """The first number of a tensor is another."""

    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def rows_swapped(tensor: Tensor) -> Tensor:
    return tensor[[0, 1, 3, 2, *range(4, len(tensor))]]


def heads_permuted(packed: Tensor) -> Tensor:
    return packed.unflatten(1, (8, -1)).flip(1).flatten(1)  # o_proj reads the heads in another order, 4 bytes each


def of_layer(one: str, other: str) -> Callable[[Tensors], None]:
    """A layer holds what belongs into another one."""
    return lambda found: found.update(moved(found, other, one))


Q, OUT, DOWN = f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj", f"{MLP}.down_proj"
SWAPPED = {  # what changes places with what, and the first tensor that is told
    (f"{MLP}.gate_proj", f"{MLP}.up_proj", ""): ("nvfp4", "nvfp4_awq"),
    (Q, f"{ATTENTION}.k_proj", ""): ("nvfp4",),
    (f"{EXPERTS}.0", f"{EXPERTS}.3", ".gate_proj"): ("nvfp4", "nvfp4_awq"),
}
LOST = ["input_layernorm.weight", "self_attn.q_proj.bias", "self_attn.v_proj.v_scale", "self_attn.o_proj.input_scale"]
LOST += ["mlp.experts.2.up_proj.weight_scale", "self_attn.o_proj.pre_quant_scale"]
# what is wrong -> format, how, what is said of it
DEFECTS: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    f"{one} and {other} swapped in {form}": (
        form, swapped(one, other), f"{one}{told}.weight: .*it holds what the reference has in {other}{told}.weight")
    for (one, other, told), forms in SWAPPED.items() for form in forms
} | {
    f"codes of {form} in the other order": (
        form, changed(f"{DOWN}.weight", lambda t: t << 4 | t >> 4),
        f"{DOWN}.weight: .*the two codes in each of its bytes are in the other order")
    for form in ("nvfp4", "int4_awq")
} | {
    f"{name} lost": (
        "int4_awq" if "pre_quant" in name else "nvfp4", dropped(f"{L1}.{name}"), f"{L1}.{name} is missing")
    for name in LOST
} | {
    "scales off by one block": (
        "nvfp4", changed(f"{Q}.weight_scale", lambda t: raw(t).roll(1, 1).view(t.dtype)),
        f"{Q}.weight: .*its weight_scale is off by one block along its inputs"),
    "one scale off": (
        "nvfp4", changed(f"{DOWN}.weight_scale", first(0.02)),
        f"{DOWN}.weight: 1 of 256 blocks are further .*first at row 0"),
    "scales off by one row": (
        "int4_awq", changed(f"{EXPERTS}.0.up_proj.weight_scale", lambda t: t.roll(1, 0) * (1 + torch.arange(64)[:, None])),
        f"{EXPERTS}.0.up_proj.weight: "),
    "scales transposed": (
        "nvfp4", changed(f"{OUT}.weight_scale", lambda t: raw(t).T.reshape(t.shape).view(t.dtype)),
        f"{OUT}.weight: .*its weight_scale is transposed"),
    "a wrong vocabulary row": (
        "nvfp4", changed("model.embed_tokens.weight", rows_swapped),
        "model.embed_tokens.weight: 2 of 192 rows differ from the reference, first 2 "),
    "a zero scale": (
        "nvfp4", changed(f"{Q}.weight_scale", first(0.0)), f"{Q}.weight_scale holds a scale that is not above zero"),
    "a NaN of e8m0": ("mxfp8", changed(f"{Q}.weight_scale", first(0xFF)), f"{Q}.weight_scale holds NaN or Inf"),
    "scales of e8m0 transposed": (
        "mxfp8", changed(f"{OUT}.weight_scale", lambda t: t.T.reshape(t.shape)),
        f"{OUT}.weight: .*its weight_scale is transposed"),
    "a NaN": ("nvfp4", changed(f"{L1}.input_layernorm.weight", first(torch.nan)), f"{L1}.input_layernorm.weight holds NaN"),
    "an infinite input scale": (
        "nvfp4", changed(f"{Q}.input_scale", first(torch.inf)), f"{Q}.input_scale holds NaN or Inf"),
    "a layer off by one": (
        "nvfp4", of_layer(f"{L1}.self_attn", f"{L2}.self_attn"),
        f"{Q}.weight: .*it holds what the reference has in {L2}.self_attn.q_proj.weight"),
    "a tensor too many": (
        "nvfp4", lambda found: found.update({f"{Q}.zero_point": torch.zeros(1)}),
        f"{Q}.zero_point is not part of this model in nvfp4"),
    "scales in another dtype": (
        "nvfp4", changed(f"{Q}.weight_scale", lambda t: t.float()), f"{Q}.weight_scale is F32, not F8_E4M3"),
    "codes of another shape": (
        "nvfp4", changed(f"{Q}.weight", lambda t: t[:32]), rf"{Q}.weight is \[32, 32\], not \[64, 32\]"),
    "weight_scale_2 doubled": (
        "nvfp4", changed(f"{DOWN}.weight_scale_2", lambda t: t * 2),
        f"{DOWN}.weight: .*it is 2 times what it should be"),
    "weight_scale_2 of gate is not that of up": (
        "nvfp4", changed(f"{MLP}.up_proj.weight_scale_2", lambda t: t * 1.001),
        f"{MLP}.up_proj.weight_scale_2 is .* but {MLP}.gate_proj.weight_scale_2"),
    "a norm that took no smoothing over": (
        "nvfp4_awq", lambda found: found.update({f"{L1}.input_layernorm.weight": NORMS[f"{L1}.input_layernorm.weight"]}),
        f"{Q}.weight: .*its columns are scaled by .*, which {L1}.input_layernorm.weight does not undo"),
    "an up_proj that took no smoothing over": (
        "nvfp4_awq", changed(f"{MLP}.up_proj.weight_scale_2", lambda t: t * 2),
        f"{DOWN}.weight: .*it is 2 times what it should be"),
    "a bias of zeros": ("nvfp4", changed(f"{Q}.bias", torch.zeros_like), f"{Q}.bias: 64 of 64 numbers differ"),
    "the inputs of o_proj in another order": (
        "int4_awq", changed(f"{OUT}.weight", heads_permuted),
        f"{OUT}.weight: .*its inputs are in another order: number 0 is the reference's 56"),
    "the head replaced": (
        "nvfp4", lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}),
        "lm_head.weight: .*it holds what the reference has in model.embed_tokens.weight"),
    "an expert left in bfloat16": (
        "nvfp4", lambda found: left_alone(found, f"{EXPERTS}.1.down_proj"),
        f"{EXPERTS}.1.down_proj.weight is not quantized, unlike"),
    "a router in another order": (
        "nvfp4", changed(f"{L1}.mlp.gate.weight", rows_swapped), f"{L1}.mlp.gate.weight: 2 of 4 rows differ"),
}  # fmt: skip
NORMS: Tensors = {}


def left_alone(found: Tensors, module: str) -> None:
    for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
        del found[f"{module}.{suffix}"]
    found[f"{module}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)


@pytest.fixture
def folder(sound: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint of the test's own, in nvfp4, to damage."""
    return Path(shutil.copytree(sound["nvfp4"], tmp_path / "out"))


def problems(folder: Path, reference: Path) -> str:
    return "\n".join(judge(folder, reference).problems)


@pytest.mark.parametrize("format", SETTINGS)
def test_a_sound_checkpoint_has_no_defect(format: str, sound: dict[str, Path], reference: Path) -> None:
    judged = judge(sound[format], reference)
    assert judged.problems == []
    assert judged.plan.format == format
    assert (judged.plan.kv and judged.plan.kv.name) == SETTINGS[format].get("kv_cache")
    assert len(judged.weights) == len(tensors(reference))


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_planted_defect_is_found(defect: str, sound: dict[str, Path], reference: Path, tmp_path: Path) -> None:
    format, change, message = DEFECTS[defect]
    NORMS.update(tensors(reference))
    folder = copied(sound[format], tmp_path / "out", change)
    found = problems(folder, reference)
    assert re.search(message, found), found


def test_a_stale_file_is_found_by_its_weights_alone(folder: Path, reference: Path, tmp_path: Path) -> None:
    """Its weights are those of an earlier step: three percent of the way back to others."""
    older = tmp_path / "older"
    older.mkdir()
    (older / "config.json").write_bytes((reference / "config.json").read_bytes())
    torch.manual_seed(3)
    other = {n: t + 0.03 * t.std() * torch.randn_like(t) if t.dim() > 1 else t for n, t in tensors(reference).items()}
    save_file(other, older / "model.safetensors")
    exported(older, tmp_path / "stale", "nvfp4", max_shard_size=60_000, **SETTINGS["nvfp4"])
    file = sorted(folder.glob("*.safetensors"))[2].name
    (folder / file).write_bytes((tmp_path / "stale" / file).read_bytes())
    found = problems(folder, reference)
    stale = {line.partition(".weight:")[0] for line in found.splitlines()}
    index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    matrices = {
        n.removesuffix(".weight") for n, f in index.items() if f == file and other.get(n, torch.ones(1)).dim() > 1
    }
    assert stale == matrices, found


def test_a_truncated_file_is_named_and_the_rest_is_still_judged(folder: Path, reference: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    judged = judge(folder, reference)
    assert len(judged.problems) == 1, judged.problems
    assert str(path) in judged.problems[0]
    assert judged.weights


def test_a_stray_file_is_named(folder: Path, reference: Path) -> None:
    save_file({"input_ids": torch.zeros(2, dtype=torch.int64)}, folder / "ids.safetensors")
    assert "ids.safetensors is not in model.safetensors.index.json" in problems(folder, reference)


def edited(folder: Path, file: str, change: Callable[[dict], None]) -> None:
    said = read_json(folder / file)
    change(said)
    (folder / file).write_text(json.dumps(said))


CONFIGS: dict[str, tuple[str, Callable[[dict], None], str]] = {
    "another algorithm": (
        "hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="FP8"),
        "hf_quant_config.json says quant_algo FP8, but the tensors are those of NVFP4"),
    "no algorithm": (
        "config.json", lambda c: c["quantization_config"].pop("quant_algo"),
        "config.json says quant_algo None, but the tensors are"),
    "too much excluded": (
        "config.json", lambda c: c["quantization_config"]["ignore"].append("*.o_proj"),
        f"config.json excludes {OUT}, whose {OUT}.weight is quantized"),
    "too little excluded": (
        "hf_quant_config.json", lambda c: c["quantization"]["exclude_modules"].remove("lm_head"),
        "hf_quant_config.json does not exclude lm_head, whose lm_head.weight is not"),
    "a router not excluded": (
        "config.json", lambda c: c["quantization_config"]["ignore"].remove(f"{L1}.mlp.gate"),
        f"config.json does not exclude {L1}.mlp.gate, whose"),
    "another KV cache": (
        "hf_quant_config.json", lambda c: c["quantization"].update(kv_cache_quant_algo=None),
        "the KV cache is fp8 in config.json but none in hf_quant_config.json"),
    "another rotation": (
        "config.json", lambda c: c["rope_parameters"].update(rope_theta=17.0), "config.json means rope"),
    "another norm": ("config.json", lambda c: c.update(rms_norm_eps=0.5), "config.json means layernorm_epsilon = 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("defect", CONFIGS)
def test_configs_that_say_something_else_are_found(defect: str, folder: Path, reference: Path) -> None:
    file, change, message = CONFIGS[defect]
    edited(folder, file, change)
    assert message in problems(folder, reference)


def test_an_index_that_is_not_that_of_the_files_is_found(folder: Path, reference: Path) -> None:
    paths = sorted(path.name for path in folder.glob("*.safetensors"))
    edited(folder, "model.safetensors.index.json", lambda c: c["weight_map"].update({"lm_head.weight": paths[0]}))
    assert f"says that lm_head.weight is in {paths[0]}" in problems(folder, reference)


@pytest.mark.parametrize("value", [[], "x", 3, {"ignore": 3, "quant_algo": []}, {"kv_cache_scheme": "?"}])
def test_configs_of_no_sense_are_problems_and_not_crashes(value: object, folder: Path, reference: Path) -> None:
    edited(folder, "config.json", lambda c: c.update(quantization_config=value))
    assert "config.json says quant_algo None, but the tensors are those of NVFP4" in problems(folder, reference)


@pytest.mark.parametrize(
    "change", [lambda c: c.pop("quantization_config"), lambda c: c.update(quantization_config=None)]
)
def test_hf_quant_config_alone_is_claim_enough(change: Callable[[dict], object], folder: Path, reference: Path) -> None:
    """As older releases of ModelOpt write it. With neither file, nothing says that the tensors are quantized."""
    edited(folder, "config.json", change)
    (folder / "export_manifest.json").unlink(missing_ok=True)
    assert problems(folder, reference) == ""
    edited(folder, "hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="FP8"))
    assert "hf_quant_config.json says quant_algo FP8, but the tensors are those of NVFP4" in problems(folder, reference)
    (folder / "hf_quant_config.json").unlink()
    assert "config.json says quant_algo None, but the tensors are those of NVFP4" in problems(folder, reference)


@pytest.mark.parametrize("method", ["compressed-tensors", "mxfp4", "gptq", "fp8"])
def test_a_dialect_that_is_not_known_is_not_judged(method: str, folder: Path, reference: Path) -> None:
    edited(folder, "config.json", lambda c: c.update(quantization_config={"quant_method": method}))
    with pytest.raises(ExportError, match=f"is quantized in the dialect '{method}', which is not known here"):
        judge(folder, reference)


@pytest.mark.parametrize("files", [[], {"a": 1}, {"model-00001-of-00003.safetensors": {}}])
def test_a_manifest_of_no_sense_is_a_problem(files: object, folder: Path, reference: Path) -> None:
    (folder / "export_manifest.json").write_text(json.dumps({"files": files}))
    assert "export_manifest.json" in problems(folder, reference)


def test_a_manifest_that_leads_out_of_the_folder_is_refused(folder: Path, reference: Path) -> None:
    (folder / "export_manifest.json").write_text(json.dumps({"files": {"../../secret": {"sha256": "0"}}}))
    with pytest.raises(ExportError, match="is not the name of a file in this folder"):
        judge(folder, reference)


@pytest.mark.parametrize("format", ["w4a8_nvfp4_fp8", "fp8_pc_pt", "w4a16_nvfp4", "mxfp4", "mxfp8"])
def test_a_format_is_told_by_its_tensors_where_both_configs_name_another(
    format: str, reference: Path, tmp_path: Path
) -> None:
    """w4a8_nvfp4_fp8 differs from nvfp4 in how many inputs share a scale."""
    plan = exported(reference, tmp_path / format, format)
    for file, section in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        edited(tmp_path / format, file, lambda said, section=section: said[section].update(quant_algo="NVFP4"))
    [form] = plan.forms
    assert f"says quant_algo NVFP4, but the tensors are those of {form.algorithm}" in problems(
        tmp_path / format, reference
    )
