"""Models with ModelOpt's quantizers or with LoRA adapters in them, by stand-ins with the attributes of the real ones.

`calibration/test_modelopt.py` has the real quantizers.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_export import calibrate, export_hf_checkpoint
from megatron_export.mcore.model import experts_of, linears_of
from megatron_export.models import parameters_of

from ..calibration.test_grouped_experts import GroupedMLP
from ..support.additions import (
    FOUR_OVER_SIX,
    FP8,
    FP8_PB,
    INT4,
    NVFP4,
    OFF,
    STATIC,
    adapt,
    factors,
    quantize,
    vector_of,
)
from ..support.live import batches, differences, loaded, refusal, traces
from ..support.models import assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that blocks of 128 divide, on two ranks too."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    return make_model(tmp_path_factory.mktemp("models"), "llama31", **sizes, num_key_value_heads=2)


def export_quantized(source: Path, out: Path, tp: int, how: tuple, changes: dict, asked: dict) -> tuple[list[str], str]:
    """In a rank: put quantizers into a model and export it; returns what that changed in the model, and why it was not done."""
    with loaded(source, tp) as (model, _):
        quantize(model, *how, **changes)
        before = traces(model)
        said = refusal(export_hf_checkpoint, model, out, hf_model=source, **asked)
        return differences(before, traces(model)), said


def export_plain(source: Path, out: Path, statistics: dict[str, Tensor], asked: dict) -> None:
    """In a rank alone: export the model without quantizers, with statistics that are given."""
    with loaded(source, 1) as (model, _):
        export_hf_checkpoint(model, out, hf_model=source, calibration=statistics, **asked)


def inputs_of(source: Path) -> dict[str, Tensor]:
    """What the stand-ins say of inputs and caches, as `calibrate` would."""
    names = [name for name in parameters_of(read_json(source / "config.json")) if ".linear_" in name]
    modules = [name.removesuffix(".weight") for name in names]
    found = {f"{module}.input_amax": torch.tensor(2.0 + sum(module.encode()) % 7) for module in modules}
    attentions = sorted({module.rpartition(".")[0] for module in modules if "self_attention" in module})
    for number, attention in enumerate(attentions):
        found |= {f"{attention}.k_amax": torch.tensor(3.0 + number), f"{attention}.v_amax": torch.tensor(5.0 + number)}
    return found


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("how", "asked"),
    [
        ((FP8, FP8, FP8), {"format": "fp8", "kv_cache": "fp8"}),
        ((FP8, FP8, FP8 | {"_use_constant_amax": True}), {"format": "fp8", "kv_cache": "fp8", "kv_scale": 1.0}),
        ((NVFP4, NVFP4, NVFP4), {"format": "nvfp4", "kv_cache": "nvfp4"}),
        ((FP8_PB, OFF), {"format": "fp8_pb"}),
    ],
)
def test_a_quantized_model_says_itself_what_it_is_exported_to(
    how: tuple, asked: dict, tp: int, wide: Path, ranks: Ranks, tmp_path: Path
) -> None:
    assert ranks.call(tp, export_quantized, wide, tmp_path / "quantized", tp, how, {}, {}) == [([], "")] * tp
    ranks.call(1, export_plain, wide, tmp_path / "plain", inputs_of(wide), asked)
    assert_same(tensors(tmp_path / "quantized"), tensors(tmp_path / "plain"))
    configs = [read_json(tmp_path / made / "config.json") for made in ("quantized", "plain")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("weights", "inputs", "scales", "format"),
    [
        (STATIC, NVFP4, "mse", "nvfp4"),
        (STATIC, OFF, "mse", "w4a16_nvfp4"),
        (FOUR_OVER_SIX, NVFP4, "four_over_six", "nvfp4"),
    ],
)
def test_static_scales_of_nvfp4_are_those_that_the_quantizers_hold(
    weights: dict, inputs: dict, scales: str, format: str, tp: int, wide: Path, ranks: Ranks, tmp_path: Path
) -> None:
    how = (weights, inputs)
    made = ranks.call(tp, export_quantized, wide, tmp_path / "quantized", tp, how, {"scales": scales}, {})
    assert made == [([], "")] * tp
    ranks.call(1, export_plain, wide, tmp_path / "plain", inputs_of(wide), {"format": format, "nvfp4_scales": scales})
    assert_same(tensors(tmp_path / "quantized"), tensors(tmp_path / "plain"))
    said = read_json(tmp_path / "quantized" / "config.json")["quantization_config"]
    assert said["quant_algo"] == format.upper()


@pytest.mark.parametrize(("how", "largest"), [((FP8, FP8), 448), ((NVFP4, NVFP4), 448 * 6)])
def test_weights_trained_since_keep_the_amaxes_of_their_quantizers(
    how: tuple, largest: int, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    found = ranks.call(2, export_quantized, models["qwen3"], tmp_path / "out", 2, how, {"factor": 0.5}, {})
    assert found == [([], "")] * 2
    source, found = tensors(models["qwen3"]), tensors(tmp_path / "out")
    name = "weight_scale" if largest == 448 else "weight_scale_2"
    for number in range(4):
        prefix = f"model.layers.{number}"
        amax = torch.stack([source[f"{prefix}.mlp.{part}_proj.weight"].abs().amax() for part in ("gate", "up")]).amax()
        for part in ("gate", "up"):
            assert found[f"{prefix}.mlp.{part}_proj.{name}"] == amax.float() / 2 / torch.tensor(float(largest))


@pytest.mark.parametrize(
    ("how", "quant_algo"),
    [((INT4, OFF), "W4A16_AWQ"), ((INT4, FP8), "W4A8_AWQ"), ((NVFP4, NVFP4), "NVFP4_AWQ")],
)
def test_weights_that_are_smoothed_already_are_not_smoothed_again(
    how: tuple, quant_algo: str, wide: Path, ranks: Ranks, tmp_path: Path
) -> None:
    for tp in (1, 2):
        made = ranks.call(tp, export_quantized, wide, tmp_path / str(tp), tp, how, {"smoothed": True}, {})
        assert made == [([], "")] * tp
    found, source = tensors(tmp_path / "1"), tensors(wide)
    assert_same(found, tensors(tmp_path / "2"))
    assert read_json(tmp_path / "1" / "config.json")["quantization_config"]["quant_algo"] == quant_algo
    for number in range(2):
        layer = f"decoder.layers.{number}"
        for norm, linear in (("input", "self_attention.linear_qkv"), ("post_attention", "mlp.linear_fc1")):
            name = f"model.layers.{number}.{norm}_layernorm.weight"
            assert torch.equal(found[name], source[name] * vector_of(f"{layer}.{linear}", 256))
        kept = found[f"model.layers.{number}.self_attn.o_proj.pre_quant_scale"]
        assert torch.equal(kept, vector_of(f"{layer}.self_attention.linear_proj", 256))
        assert (f"model.layers.{number}.mlp.down_proj.pre_quant_scale" in found) is (how[0] == INT4)


def group(model: nn.Module) -> None:
    """Put the experts of each layer into one module, and their quantizers as ModelOpt has them there."""
    for layer in experts_of(model).values():
        grouped = GroupedMLP(layer.experts)
        for name in ("linear_fc1", "linear_fc2"):
            single = [getattr(expert, name) for expert in layer.experts.local_experts]
            linear = getattr(grouped, name)
            linear.weight_quantizer = nn.ModuleList([one.weight_quantizer for one in single])
            linear.input_quantizer = single[0].input_quantizer
        layer.experts = grouped


def export_experts(source: Path, out: Path, ep: int, grouped: bool) -> None:
    """In a rank: export experts with quantizers, and one layer's attention without."""
    with loaded(source, ep=ep) as (model, _):
        quantize(model, FP8, FP8)
        for name, module in linears_of(model).items():
            if name.startswith("decoder.layers.0.self_attention"):
                module.weight_quantizer._disabled = module.input_quantizer._disabled = True
        if grouped:
            group(model)
        export_hf_checkpoint(model, out, hf_model=source)


def test_experts_have_amaxes_of_their_own_and_linears_without_quantizers_stay(
    models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    for ep in (1, 2):
        ranks.call(ep, export_experts, models["qwen3_moe"], tmp_path / str(ep), ep, grouped=ep == 2)
    found, source = tensors(tmp_path / "1"), tensors(models["qwen3_moe"])
    assert_same(found, tensors(tmp_path / "2"))
    for expert in range(4):
        weight = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        assert found[f"{weight}_scale"] == source[weight].abs().amax().float() / torch.tensor(448.0)
    alone = {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"}
    assert_same({name: found[name] for name in alone}, {name: source[name] for name in alone})
    ignored = read_json(tmp_path / "1" / "config.json")["quantization_config"]["ignore"]
    assert {name.removesuffix(".weight") for name in alone} <= set(ignored)


@pytest.mark.parametrize(
    ("how", "changes", "asked", "said"),
    [
        ((FP8, FP8), {}, {"format": "nvfp4"}, "format is 'nvfp4', but ModelOpt quantized this model to 'fp8'"),
        ((FP8, FP8, FP8), {}, {"kv_cache": "none"}, "kv_cache is 'none', but ModelOpt quantized this model to 'fp8'"),
        ((FP8, FP8), {}, {"calibration": {}}, "leave calibration out"),
        ((INT4, OFF), {"smoothed": True}, {"exclude": ["*.o_proj"]}, "exclude cannot undo what ModelOpt has smoothed"),
        ((FP8_PB, OFF), {"factor": 0.5}, {}, "(of 8 such): its quantizer's amaxes are not those of its weight's blocks"),
        ((STATIC, NVFP4), {"scales": "mse", "factor": 2}, {}, "(of 8 such): its quantizer's amaxes are not those"),
        ((STATIC, NVFP4), {"scales": "mse"}, {"nvfp4_scales": "four_over_six"}, "nvfp4_scales is 'four_over_six', but"),
        ((FP8 | {"_axis": 0}, FP8), {}, {}, "(8 such): ModelOpt's input_quantizer is e4m3; weight_quantizer is e4m3, one"),
    ],
)  # fmt: skip
def test_contradictions_of_a_quantized_model_are_refused(
    how: tuple, changes: dict, asked: dict, said: str, wide: Path, ranks: Ranks, tmp_path: Path
) -> None:
    first, second = ranks.call(2, export_quantized, wide, tmp_path / "out", 2, how, changes, asked)
    assert first == second
    assert first[0] == []
    assert said in first[1]
    assert list(tmp_path.iterdir()) == []


def calibrate_additions(source: Path, style: str, form: str) -> str:
    """In a rank: why a model with additions is not calibrated."""
    with loaded(source, 1) as (model, _):
        quantize(model, FP8, FP8) if style == "modelopt" else adapt(model, style)
        return refusal(calibrate, model, batches(source), format=form)


def test_what_would_be_measured_wrongly_is_not_calibrated(models: dict, ranks: Ranks) -> None:
    source = models["llama31"]
    assert "ModelOpt quantizes this model" in ranks.call(1, calibrate_additions, source, "modelopt", "fp8")[0]
    assert "(of 16 such) has an adapter" in ranks.call(1, calibrate_additions, source, "bridge", "nvfp4_awq")[0]
    assert ranks.call(1, calibrate_additions, source, "bridge", "fp8") == [""]


def export_adapted(source: Path, out: Path, tp: int, style: str, merge: bool) -> tuple[list[str], str]:
    """In a rank: put adapters into a model and export it; returns what that changed, and why it was not done."""
    with loaded(source, tp) as (model, _):
        adapt(model, style)
        before = traces(model)
        said = refusal(export_hf_checkpoint, model, out, hf_model=source, format="bf16", merge_lora=merge)
        return differences(before, traces(model)), said


@pytest.mark.parametrize("style", ["bridge", "modelopt"])
def test_adapters_are_merged_to_the_same_bytes_at_any_tp(
    style: str, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """To the bit: bfloat16 factors have products and sums of 8 that float64 holds without rounding."""
    source = models["llama31"]
    for tp in (1, 2, 4):
        for answer in ranks.call(tp, export_adapted, source, tmp_path / str(tp), tp, style, True):
            assert answer == ([], "")
    expected = tensors(source)
    for name, parameter in parameters_of(read_json(source / "config.json")).items():
        if ".linear_" not in name:
            continue
        names, layout = parameter.names(), parameter.layout
        whole = layout.join({part: expected[hf] for part, hf in names.items()}, parameter.shape[0])
        first, second = factors(name.removesuffix(".weight"), *parameter.shape, 8)
        total = (whole.double() + 1.5 * (second.double() @ first.double())).bfloat16()
        expected |= {names[part]: tensor for part, tensor in layout.split(total, 0, 1).items()}
    for tp in (1, 2, 4):
        assert_same(tensors(tmp_path / str(tp)), expected)
    assert not torch.equal(
        tensors(source)["model.layers.0.mlp.up_proj.weight"], expected["model.layers.0.mlp.up_proj.weight"]
    )


def test_adapters_are_refused_unless_they_are_to_be_merged(models: dict, ranks: Ranks, tmp_path: Path) -> None:
    for changed, said in ranks.call(2, export_adapted, models["llama31"], tmp_path / "out", 2, "bridge", False):
        assert changed == []
        assert "the model has LoRA adapters on decoder.layers.0" in said
        assert said.endswith("(16 in all), which a checkpoint has no place for. Merge them with merge_lora=True")
    assert list(tmp_path.iterdir()) == []


def refused_adapters(source: Path, out: Path, kind: str) -> str:
    """In a rank alone: why adapters of a kind are not merged."""
    with loaded(source, 1) as (model, _):
        if kind != "none":
            adapt(model, "bridge")
        first = model.decoder.layers[0].mlp.linear_fc1
        if kind == "dora":
            first.adapter.weight_magnitude = nn.Parameter(torch.ones(4))
        elif kind == "activation":
            first.adapter.activation = nn.SiLU()
        elif kind == "sizes":
            first.adapter.linear_in.weight = nn.Parameter(torch.ones(8, 7))
        elif kind == "quantized":
            quantize(model, FP8, FP8)
        form = None if kind == "quantized" else "bf16"
        return refusal(export_hf_checkpoint, model, out, hf_model=source, format=form, merge_lora=True)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("none", "merge_lora has no effect: the model has no LoRA adapters"),
        ("dora", "decoder.layers.0.mlp.linear_fc1: adapters of BridgeLoRA are not merged here"),
        ("activation", "decoder.layers.0.mlp.linear_fc1: adapters of BridgeLoRA are not merged here"),
        ("sizes", "the adapter of decoder.layers.0.mlp.linear_fc1.weight is (192, 8) times (8, 7)"),
        ("quantized", "ModelOpt's quantizers, which were calibrated without them"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(
    kind: str, said: str, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    (text,) = ranks.call(1, refused_adapters, models["llama31"], tmp_path / "out", kind)
    assert said in text
