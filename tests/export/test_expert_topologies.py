"""Models with experts: the same files, to the byte, on every topology and in every format, given one calibration file.

The widths are chosen so that shards are not whole tiles: a half of the experts' 128 inputs of down_proj cuts a group of
128, a half of q, k and v's outputs a block of 128 x 128, and so do the halves of latent attention's projections.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_export import calibrate, export_hf_checkpoint
from megatron_export.calibration import statistics
from megatron_export.mcore.build import build_model
from megatron_export.mcore.load_hf import load_hf_weights
from megatron_export.mcore.parallel_state import current, started

from ..support.models import LENGTH, assert_same, contents, make_model, read_json, tensors
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

# ranks, then the arguments of `started`, and Megatron's spelling of what the stages hold
TOPOLOGIES: dict[str, tuple[int, dict, str | None]] = {
    "tp2": (2, {"tp": 2}, None),
    "pp2": (2, {"pp": 2}, None),
    "ep2": (2, {"ep": 2}, None),
    "ep4": (4, {"ep": 4}, None),
    "ep2 twice": (4, {"ep": 2}, None),
    "tp2 etp2": (2, {"tp": 2, "etp": 2}, None),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}, None),
    "tp2 ep2 etp1": (2, {"tp": 2, "ep": 2, "etp": 1}, None),
    "tp1 etp2": (2, {"etp": 2}, None),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}, None),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}, None),
    "pp3": (3, {"pp": 3}, None),  # of 4 layers
    "an empty stage": (2, {"pp": 2}, "Etttt|L"),
    "tp2 pp2 ep2": (8, {"tp": 2, "pp": 2, "ep": 2}, None),
}
VARIANTS: dict[str, dict] = {
    "bf16": {},
    "fp8": {},
    "fp8_pb": {},
    "nvfp4": {},
    "w4a16_nvfp4": {},
    "fp8_pc_pt": {},
    "mxfp8": {},
    "mxfp4": {},
    "w4a8_nvfp4_fp8": {},
    "w4a8_mxfp4_fp8": {},
    "nvfp4_awq": {"awq_clip": True},
    "nvfp4_awq modelopt": {"awq_output": "modelopt"},
    "int4_awq": {"awq_clip": True},
    "w4a8_awq": {},
    "mixed": {"recipe": "nvfp4_experts_fp8_attention"},
    "mixed awq": {"format": "int4_awq", "set": ("*.self_attn.*=fp8", "*.layers.0.*=w4a16_nvfp4")},
}
LATENT = {"fp8 mla": {"quantize_mla": True}, "nvfp4_awq mla": {"quantize_mla": True, "awq_clip": True},
          "int4_awq mla": {"quantize_mla": True, "awq_clip": True}}  # fmt: skip
AWQ = ("nvfp4_awq", "int4_awq", "w4a8_awq", "nvfp4_awq mla", "int4_awq mla")
# What the default run takes of the product: every topology and every format with every architecture.
TAKEN: dict[str, tuple[str, ...]] = {
    "tp2": ("nvfp4", "int4_awq mla"),
    "pp2": ("nvfp4_awq",),
    "ep2": AWQ,
    "ep4": ("fp8", "w4a8_mxfp4_fp8"),
    "ep2 twice": ("nvfp4_awq modelopt",),
    "tp2 etp2": ("mixed awq", "fp8_pb", "fp8 mla", "fp8_pc_pt", "w4a8_nvfp4_fp8"),
    "tp2 etp1": ("fp8", "int4_awq"),
    "tp2 ep2 etp1": ("w4a8_awq",),
    "tp1 etp2": ("int4_awq", "mxfp8"),
    "tp2 ep2": (*AWQ, "mixed"),
    "pp2 vpp2": ("nvfp4", "fp8 mla"),
    "pp3": ("fp8_pb", "w4a16_nvfp4", "mxfp4"),
    "an empty stage": ("bf16",),
    "tp2 pp2 ep2": ("fp8", "nvfp4_awq"),
}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
MODELS: dict[str, dict] = {
    "qwen3_moe": WIDE,
    "mixtral": {"hidden_size": 128, "intermediate_size": 128},
    "deepseek_v3": WIDE | {"q_lora_rank": 128, "kv_lora_rank": 128},
    "llama4_vision": {"hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 256},
}


def options_of(name: str) -> dict[str, dict]:
    """The variants of a model: those of latent attention only where there is any."""
    return VARIANTS | (LATENT if name == "deepseek_v3" else {})


def product(taken: bool) -> list:
    """(model, topology, its variants) that the default run takes, or all others."""
    return [
        pytest.param(name, topology, variants, id=f"{name}-{topology.replace(' ', '_')}")
        for name in MODELS
        for topology in TOPOLOGIES
        if (variants := tuple(v for v in options_of(name) if (v in TAKEN[topology]) is taken))
    ]


def measure(source: Path, file: Path) -> None:
    """In a rank alone: one calibration file for all formats."""
    config = read_json(source / "config.json")
    with started(1, 1, "cpu"), current() as here:
        model = build_model(config, here, max_sequence_length=LENGTH)
        load_hf_weights(model, source, config, here)
        ids = load_file(source.parent / "ids" / "calibration.safetensors")["input_ids"]
        found = calibrate(model, [ids[:4]], format=("nvfp4_awq", "int4_awq"), awq_clip=True)
        statistics.save(found, file, config)


def export(source: Path, out: Path, sizes: dict, layout: str | None, variants: dict[str, dict]) -> None:
    """In a rank: load the model on this topology and export each variant to a folder of `out`."""
    config = read_json(source / "config.json")
    measured = statistics.load(out.parent / "calibration.safetensors", config)
    rest = {key: size for key, size in sizes.items() if key not in ("tp", "pp")}
    with started(sizes.get("tp", 1), sizes.get("pp", 1), "cpu", **rest):
        with current() as here:
            model = build_model(config, here, max_sequence_length=None, pp_layout=layout)
            load_hf_weights(model, source, config, here)
        for variant, options in variants.items():
            form = variant.split()[0]
            chosen = {} if form == "mixed" else {"format": form}
            given = chosen | kv(source, form) | options
            export_hf_checkpoint(model, out / variant, hf_model=source, calibration=measured, **given)


def kv(source: Path, form: str) -> dict:
    """A format for the KV cache, where engines have one."""
    return {"kv_cache": "fp8"} if form != "bf16" and source.name != "deepseek_v3" else {}


@pytest.fixture(scope="module")
def eight() -> Iterator[Ranks]:
    """The ranks of this file, which need not start four others beside them."""
    ranks = Ranks(8)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def references(eight: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of every model its checkpoint, and a folder with the calibration file and all exports of one rank."""
    found = {}
    for name, sizes in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        source = make_model(folder, name, **sizes)
        eight.call(1, measure, source, folder / "calibration.safetensors")
        eight.call(1, export, source, folder / "alone", {}, None, options_of(name))
        found[name] = (source, folder / "alone")
    return found


def check(ranks: Ranks, source: Path, alone: Path, out: Path, topology: str, variants: tuple[str, ...]) -> None:
    """A topology writes the folders of one rank."""
    world, sizes, layout = TOPOLOGIES[topology]
    chosen = {variant: options_of(source.name)[variant] for variant in variants}
    (out / "calibration.safetensors").write_bytes((alone.parent / "calibration.safetensors").read_bytes())
    ranks.call(world, export, source, out / "exports", sizes, layout, chosen)
    for variant in variants:
        here, there = out / "exports" / variant, alone / variant
        if contents(here) != contents(there):
            assert_same(tensors(here), tensors(there))  # says which tensor
            pytest.fail(f"{variant}: the tensors are the same, the files are not")


@pytest.mark.parametrize(("name", "topology", "variants"), product(taken=True))
def test_every_topology_writes_the_same_files_as_one_rank(
    name: str, topology: str, variants: tuple, references: dict, eight: Ranks, tmp_path: Path
) -> None:
    check(eight, *references[name], tmp_path, topology, variants)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology", "variants"), product(taken=False))
def test_every_topology_writes_all_other_formats_too(
    name: str, topology: str, variants: tuple, references: dict, eight: Ranks, tmp_path: Path
) -> None:
    check(eight, *references[name], tmp_path, topology, variants)


def test_the_default_run_takes_every_format_on_some_topology_and_awq_under_expert_parallelism() -> None:
    assert TAKEN.keys() == TOPOLOGIES.keys()
    assert {variant for variants in TAKEN.values() for variant in variants} == {*VARIANTS, *LATENT}
    assert set(AWQ) <= set(TAKEN["ep2"]) & set(TAKEN["tp2 ep2"])


@pytest.mark.parametrize("name", MODELS)
def test_bf16_gives_back_every_tensor_of_the_source_bit_for_bit(name: str, references: dict) -> None:
    source, alone = references[name]
    assert_same(tensors(alone / "bf16"), tensors(source))


def test_latent_attention_stays_in_bfloat16_unless_asked(references: dict) -> None:
    source, alone = references["deepseek_v3"]
    original = tensors(source)
    attention = [name for name in original if ".self_attn." in name and name.endswith("_proj.weight")]
    attention += [name for name in original if name.endswith("kv_a_proj_with_mqa.weight")]
    assert len(attention) == 4 * 5
    for variant, quantized in (("fp8", False), ("fp8 mla", True), ("fp8_pb", True), ("nvfp4_awq mla", True)):
        found = tensors(alone / variant)
        assert [name for name in attention if (found[name].dtype != original[name].dtype) is not quantized] == []


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama4_vision"])  # stacked experts have but one
def test_the_experts_of_a_layer_share_their_input_scales(name: str, references: dict) -> None:
    """vLLM takes the largest of a layer's for all its experts."""
    for variant in ("fp8", "nvfp4", "nvfp4_awq"):
        shared: dict[tuple[str, str], set[float]] = {}
        for key, scale in tensors(references[name][1] / variant).items():
            if ".experts." in key and key.endswith(".input_scale"):
                layer, _, rest = key.partition(".experts.")
                kind = rest.split(".")[1]
                shared.setdefault((layer, "down" if kind in ("down_proj", "w2") else "up"), set()).add(scale.item())
        assert len(shared) >= 6
        assert [place for place, scales in shared.items() if len(scales) > 1 or min(scales) <= 0] == []
