"""The plan: files and buckets, what is left alone, what is refused; and the two quantization configs made from it."""

from fnmatch import fnmatchcase

import pytest

from megatron_export.common.errors import ExportError
from megatron_export.formats import FORMATS, Options
from megatron_export.planning.plan import Held, Plan, assumed
from megatron_export.planning.quant_config import config_json, hf_quant_config
from megatron_export.planning.shard_files import BUCKET_BYTES, LANES

from ..support.configs import LLAMA_70B, NEMOTRON, QWEN35, SMALL_V3
from ..support.models import EXAMPLE, GOLDEN, read_json, tensors
from ..support.plans import plan_for, plan_of

CONFIG = read_json(EXAMPLE / "config.json")
ODD = CONFIG | {"intermediate_size": 1000}


def plan(config: dict = CONFIG, tp: int = 1, **settings: object) -> Plan:
    return plan_for(config, assumed(config, tp), **{"format": "fp8", **settings})


@pytest.mark.parametrize("form", FORMATS)
def test_the_plan_is_the_same_for_every_tensor_parallel_size(form: str) -> None:
    alone = plan(format=form)
    for tp in (2, 4):
        parallel = plan(tp=tp, format=form)
        assert parallel.files == alone.files
        assert (parallel.quantized, parallel.excluded) == (alone.quantized, alone.excluded)


def test_a_70b_model_is_cut_into_files_and_buckets_of_bounded_size() -> None:
    large = plan(LLAMA_70B, tp=8, format="nvfp4", max_shard_size=5_000_000_000)
    sizes = [sum(output.nbytes for output in outputs) for outputs in large.files.values()]
    homes = {output.name: file for file, outputs in large.files.items() for output in outputs}
    assert max(sizes) <= 5_000_000_000
    assert sum(sizes) == large.nbytes
    assert list(large.files) == [f"model-{k:05d}-of-{len(sizes):05d}.safetensors" for k in range(1, len(sizes) + 1)]
    assert large.source_nbytes == 2 * 70_553_706_496  # parameters of the published model
    rows: dict[str, list] = {item.source.canonical: [] for item in large.items}
    for bucket in large.buckets:
        assert sum(item.nbytes for item in bucket.items) <= BUCKET_BYTES  # the embedding, of 2 GB, too
        assert len({homes[output.name] for item in bucket.items for output in item.outputs}) == 1
        for item in bucket.items:
            rows[item.source.canonical].append(item.rows)
    for item in large.items:
        found = rows[item.source.canonical]
        assert found == [None] or [0, *(end for _, end in found)] == [
            *(first for first, _ in found),
            item.shard_shape[0] // len(item.parts),
        ]
    assert len(sizes) == 2 * LANES  # where 9 files would do, the ninth would be written alone
    in_layers = max(sum(o.nbytes for o in item.outputs) for item in large.items if ".layers." in item.source.canonical)
    assert max(sizes) < sum(sizes) / len(sizes) + in_layers


def test_a_module_and_its_scales_are_never_parted() -> None:
    small = plan(max_shard_size=400_000)
    homes: dict[str, set[str]] = {}
    for file, outputs in small.files.items():
        for output in outputs:
            homes.setdefault(output.name.rpartition(".")[0], set()).add(file)
    assert len(small.files) > 5
    assert all(len(files) == 1 for files in homes.values())


def test_bytes_over_the_wire_are_the_bytes_of_the_shards_once() -> None:
    parallel = plan(tp=4, format="nvfp4")
    for item in parallel.items:
        sent = sum(output.nbytes for index in range(len(item.ranks)) for output in item.message(index))
        assert sent == sum(output.nbytes for output in item.outputs)


def test_excluded_modules_are_left_alone_and_listed() -> None:
    partial = plan(exclude=("model.layers.0.*", "*.down_proj"))
    kept = [output.name for outputs in partial.files.values() for output in outputs if output.dtype == "BF16"]
    linears = sorted(name.removesuffix(".weight") for name in kept if "_proj.weight" in name)
    assert linears == sorted(set(partial.excluded) - {"lm_head", "model.embed_tokens"})
    assert "model.layers.0.self_attn.q_proj" in linears
    assert "model.layers.3.mlp.down_proj" in linears
    assert not set(partial.quantized) & set(partial.excluded)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"exclude": ("*.q_proj",)},
            "must have one format: .*q_proj bf16 .*exclude .*; .*k_proj, .*v_proj fp8 .*and 3 more such",
        ),
        ({"exclude": ("*.w1",)}, "'\\*.w1' matches no module"),
        ({"exclude": ("*",)}, "leaves nothing to quantize.*--format bf16"),
        ({"kv_cache": "fp8", "format": "bf16"}, "vLLM refuses a checkpoint that quantizes the KV cache alone"),
        ({"exclude": ("*",), "format": "bf16"}, "no effect with --format bf16"),
        ({"kv_scale": 1.0}, "--kv-scale has no effect without --kv-cache"),
        ({"kv_scale_at_least": 1.0}, "--kv-scale-at-least has no effect without --kv-cache"),
        ({"kv_cache": "fp8", "kv_scale": 2.0, "kv_scale_at_least": 1.0}, "no effect with --kv-scale"),
        ({"kv_cache": "nvfp4", "kv_scale_at_least": 1.0}, "--kv-scale-at-least is for --kv-cache fp8"),
        ({"kv_cache": "fp8", "kv_scale": float("nan")}, "--kv-scale must be a number above 0 .*, not nan"),
        ({"kv_cache": "fp8", "kv_scale_at_least": -1.0}, "--kv-scale-at-least must be a number above 0 .*, not -1.0"),
        ({"kv_cache": "fp8", "kv_scale": "one"}, "--kv-scale must be a number above 0 .*, not 'one'"),
        ({"input_scale": 1e39}, "--input-scale must be .* that float32 holds, not 1e\\+39"),
        ({"format": "int4_awq", "input_scale": 1.0}, "--format int4_awq, which writes no input_scale"),
        ({"config": SMALL_V3, "kv_cache": "fp8", "kv_scale": 2.0}, "scale of 1.*Give --kv-cache fp8 --kv-scale 1,"),
        ({"config": ODD, "format": "nvfp4"}, "down_proj.weight has 1000 inputs.*--exclude"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        plan(**settings)


def test_a_group_of_64_is_offered_where_128_does_not_divide() -> None:
    with pytest.raises(ExportError, match="down_proj.weight has 960 inputs, which blocks of 128.*Give --group-size 64"):
        plan(CONFIG | {"intermediate_size": 960}, format="int4_awq")
    assert plan(CONFIG | {"intermediate_size": 960}, format="int4_awq", options=Options(group_size=64)).quantized


def test_all_problems_of_a_model_are_told_at_once() -> None:
    held = assumed(CONFIG, 1)
    held["decoder.layers.0.mlp.linear_fc3.weight"] = Held((0,), (1, 1))
    del held["decoder.final_layernorm.weight"]
    held["decoder.layers.1.mlp.linear_fc2.weight"] = Held((0, 1), (256, 1024))
    with pytest.raises(ExportError) as refused:
        plan_for(CONFIG, held, format="fp8")
    for part in ("3 problems", "linear_fc3", "decoder.final_layernorm.weight", "(256, 1024) on each of 2 ranks"):
        assert part in str(refused.value)


MODELOPT: dict[str, dict] = {  # what ModelOpt calls it -> what we are asked for
    "FP8-KVFP8": {"format": "fp8", "kv_cache": "fp8"},
    "FP8-KVFP8CAST": {"format": "fp8", "kv_cache": "fp8", "kv_scale": 1.0, "input_scale": 0.5},
    "FP8-mcore": {"format": "fp8"},
    "NVFP4": {"format": "nvfp4"},
    "NVFP4-KVNVFP4": {"format": "nvfp4", "kv_cache": "nvfp4"},
    "W4A16_NVFP4": {"format": "w4a16_nvfp4"},
    "MXFP8": {"format": "mxfp8"},
    "NVFP4_AWQ": {"format": "nvfp4_awq", "options": Options(awq_output="modelopt")},
    "INT4_AWQ": {"format": "int4_awq"},
    "W4A8_AWQ": {"format": "w4a8_awq"},
    "FP8_PB_WO": {"format": "fp8_pb", "options": Options(fp8_pb_spelling="modelopt")},
}


@pytest.mark.parametrize("name", MODELOPT)
def test_both_configs_equal_modelopt(name: str) -> None:
    source, folder = read_json(GOLDEN / "models" / "llama-bf16" / "config.json"), f"llama-{name}"
    made = plan(source, **MODELOPT[name])
    nested = read_json(GOLDEN / "models" / folder / "hf_quant_config.json")
    algorithm = {"quant_algo": nested["quantization"]["quant_algo"].upper()}  # engines compare exact strings
    assert hf_quant_config(made) == nested | {"quantization": nested["quantization"] | algorithm}
    flat = config_json(made)["quantization_config"]
    ours = ("group_size", "has_zero_point", "pre_quant_scale")  # here too: vLLM and SGLang look for the first
    extra = {key: nested["quantization"][key] for key in ours if key in nested["quantization"]}
    assert flat == read_json(GOLDEN / "models" / folder / "config.json")["quantization_config"] | extra | algorithm


def test_fp8_pb_is_described_as_deepseek_describes_it() -> None:
    """config.json is what vLLM and SGLang read, hf_quant_config.json what TensorRT-LLM reads: the same in their words."""
    made = plan(format="fp8_pb", exclude=("model.layers.0.*",))
    flat = config_json(made)["quantization_config"]
    assert flat == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": list(made.excluded),
    }
    assert hf_quant_config(made)["quantization"] == {
        "quant_algo": "FP8_BLOCK_SCALES",
        "kv_cache_quant_algo": None,
        "group_size": 128,
        "exclude_modules": list(made.excluded),
    }


def test_folded_nvfp4_awq_is_a_plain_nvfp4_checkpoint() -> None:
    awq, nvfp4 = plan(format="nvfp4_awq"), plan(format="nvfp4")
    assert hf_quant_config(awq) == hf_quant_config(nvfp4)
    assert config_json(awq) == config_json(nvfp4)
    assert awq.files == nvfp4.files


def test_config_json_is_the_source_with_the_quantization_added() -> None:
    made = config_json(plan())
    assert {key: made[key] for key in CONFIG} == CONFIG
    assert made.keys() - CONFIG.keys() == {"quantization_config"}
    assert config_json(plan(format="bf16")) == CONFIG


@pytest.mark.parametrize("settings", [{}, {"exclude": ("model.layers.1.*",)}, {"format": "nvfp4", "kv_cache": "fp8"}])
def test_every_engine_understands_the_exclude_list_as_meant(settings: dict) -> None:
    """vLLM: exact, or the entry anywhere inside its name, fused names by all their parts. SGLang: exact or glob.
    TensorRT-LLM: a glob over the name or any of its parents. Source: their loaders, see the constraints X1 to X4.
    """
    made = plan(**settings)
    quantized, excluded = set(made.quantized), made.excluded
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for module in quantized:
        assert not any(entry in module for entry in excluded)
        parents = [module.rsplit(".", k)[0] for k in range(module.count(".") + 1)]
        assert not any(fnmatchcase(parent, entry) for parent in parents for entry in excluded)
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, parts in fused.items():
            prefix = f"model.layers.{layer}." + ("self_attn." if name == "qkv_proj" else "mlp.")
            assert len({prefix + part in excluded for part in parts}) == 1
            if prefix + parts[0] in quantized:
                assert not any(entry in prefix + name for entry in excluded)
    assert "lm_head" in excluded


def test_planned_tensors_are_those_of_modelopt() -> None:
    for name in ("FP8-KVFP8", "NVFP4", "NVFP4_AWQ", "INT4_AWQ"):
        made = plan(read_json(GOLDEN / "models" / "qwen3-bf16" / "config.json"), **MODELOPT[name])
        golden = tensors(GOLDEN / "models" / f"qwen3-{name}")
        planned = {output.name: output for outputs in made.files.values() for output in outputs}
        assert sorted(planned) == sorted(golden)
        for name, tensor in golden.items():
            assert (planned[name].torch_dtype, planned[name].shape) == (tensor.dtype, tuple(tensor.shape)), name


def test_deepseek_says_how_it_routes_also_where_transformers_left_it_out() -> None:
    said = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    config = {key: value for key, value in SMALL_V3.items() if key not in said}
    made = plan_of(config, format="bf16")
    assert config_json(made).items() >= said.items()
    assert config_json(plan()).keys().isdisjoint(said)


def test_what_transformers_writes_otherwise_is_written_as_engines_read_it() -> None:
    """Kinds of layers in NVIDIA's words, how often attention is not linear, and that a vision tower merges once."""
    kinds = ["linear_attention", "moe", "full_attention"]
    hybrid = NEMOTRON | {"hybrid_override_pattern": None, "layers_block_type": kinds}
    assert config_json(plan_of(hybrid, format="bf16"))["layers_block_type"] == ["mamba", "moe", "attention"]
    layers = ["linear_attention", "full_attention"] * 2
    assert config_json(plan_of(QWEN35 | {"layer_types": layers}, format="bf16"))["full_attention_interval"] == 2
    uneven = config_json(plan_of(QWEN35 | {"layer_types": layers[::-1]}, format="bf16"))
    assert "full_attention_interval" not in uneven
    sees = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": QWEN35 | {"layer_types": layers}}
    made = config_json(plan_of(sees | {"vision_config": {"depth": 1}}, format="bf16"))
    assert made["vision_config"] == {"depth": 1, "deepstack_visual_indexes": []}
    assert made["text_config"]["full_attention_interval"] == 2
