"""Experts that transformers names or stacks otherwise than the files do: the same model to the bit in bfloat16, that of the
decoded weights when quantized and inputs are left as they are; and what is missing is named as in the files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from launch.bench.serving import leave_inputs
from megatron_export.checkpoint.hf_weights import SourceWeights
from megatron_export.common.cpu_products import fast_products
from megatron_export.common.errors import ExportError
from megatron_export.formats import fp8
from megatron_export.models.layouts import stacked_rows
from megatron_export.planning.plan import Plan
from megatron_export.verify.emulated_experts import EmulatedExperts
from megatron_export.verify.emulation import EmulatedLinear, bits_per_weight, load, own_attention
from megatron_export.verify.folder import Finished
from megatron_export.verify.weight_pairs import Sides

from ..support.command_line import command_line
from ..support.exported import exported
from ..support.live import refusal
from ..support.models import EXAMPLE, auto_model, make_model, read_json, tensors

IDS = torch.arange(48).view(2, 24) * 7 % 500
MODELS = ("qwen3_moe", "glm4_moe", "deepseek_v3", "mixtral", "llama4", "llama4_vision", "gpt_oss")
STACKED = ("llama4", "llama4_vision", "gpt_oss")  # so they are in bfloat16


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> a checkpoint in bfloat16."""
    return {name: make_model(tmp_path_factory.mktemp("sources"), name) for name in MODELS}


def theirs(name: str, folder: Path) -> Tensor:
    """Logits of transformers' own model; experts one after the other, where it can be asked for that."""
    how = {} if name in STACKED else {"experts_implementation": "eager"}
    with fast_products("cpu"):  # as `load` multiplies
        return auto_model(name).from_pretrained(folder, dtype=torch.bfloat16, **how)(IDS).logits.float()


def decoded(source: Path, folder: Path, plan: Plan, made: Path) -> Path:
    """Write the source once more, with the weights that a checkpoint of it decodes to."""
    held = tensors(source)
    with SourceWeights(source) as weights:
        sides = Sides(plan, Finished(folder), weights, torch.device("cpu"))
        for item in plan.items:
            for number, (part, name) in enumerate(item.source.names().items()):
                size, stack = sides.shape(item, part)[0], item.source.stack
                weight = sides.decoded(item, part, slice(0, size)).to(torch.bfloat16)
                if stack is None:
                    held[name] = weight
                elif item.form:
                    count = len(item.source.names())
                    columns = stacked_rows(slice(0, size), size, number, count, stack.woven)
                    held[stack.name][stack.index][..., columns] = weight.T
    made.mkdir()
    shutil.copyfile(source / "config.json", made / "config.json")
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, made / "model.safetensors")
    return made


def altered(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    """Write a checkpoint's tensors anew, changed; returns them."""
    held = tensors(folder)
    change(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors")
    return held


def difference(left: Tensor, right: Tensor) -> float:
    """Of the logits of a token in the middle: another rounding sends a few tokens to other experts."""
    return float(((left - right).norm(dim=-1) / right.norm(dim=-1)).median())


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_it_is_transformers_own_model_to_the_bit(name: str, sources: dict[str, Path]) -> None:
    model = load(sources[name])
    assert any(isinstance(module, EmulatedExperts) for module in model.modules()) == (name not in STACKED)
    assert torch.equal(model(IDS).logits.float(), theirs(name, sources[name]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("qwen3_moe", "fp8"),
        ("mixtral", "fp8"),
        ("mixtral", "nvfp4_awq"),
        ("llama4", "fp8"),
        ("llama4", "nvfp4"),
        ("llama4_vision", "fp8"),
        ("llama4_vision", "nvfp4_awq"),
        ("llama4_vision", "fp8_pb"),
        ("gpt_oss", "fp8"),
        ("gpt_oss", "nvfp4"),
    ],
)
def test_quantized_it_is_the_model_of_the_decoded_weights(
    name: str, format: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    plan = exported(sources[name], tmp_path / "made", format)
    model = load(tmp_path / "made")
    layers = [module for module in model.modules() if isinstance(module, EmulatedExperts)]
    assert len(layers) == sum("experts.0.linear_fc2.weight" in item.source.canonical for item in plan.items)
    assert not [m for experts in layers for m in experts.modules() if isinstance(m, nn.Linear)]
    ours = model(IDS).logits.float()
    leave_inputs(model, tuple({linear.form.name for linear in model.modules() if isinstance(linear, EmulatedLinear)}))
    expected = theirs(name, decoded(sources[name], tmp_path / "made", plan, tmp_path / "decoded"))
    unrounded = difference(model(IDS).logits.float(), expected)
    assert unrounded < 0.02  # bfloat16's roundings
    assert 2 * unrounded < difference(ours, expected) < 0.5


@torch.no_grad()
@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_keys_and_values_of_a_model_without_sdpa_go_through_the_cache(
    format: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    exported(sources["gpt_oss"], tmp_path / "without", format)
    exported(sources["gpt_oss"], tmp_path / "with", format, kv_cache="fp8")
    without, model = load(tmp_path / "without"), load(tmp_path / "with")
    module = model.model.layers[1].self_attn
    query, key, value = (torch.randn(2, heads, 9, 16).to(torch.bfloat16) for heads in (8, 4, 4))
    mask = torch.full((9, 9), -torch.inf).triu(1).to(torch.bfloat16)
    output, _ = own_attention(module, query, key, value, mask, scaling=module.scaling)
    scales = torch.tensor(5.0) / 448, torch.tensor(2.0) / 448  # of what `exported` makes up
    cached = [fp8.rounded(each, scale).to(torch.bfloat16) for each, scale in zip((key, value), scales, strict=True)]
    assert torch.equal(output, eager_attention_forward(module, query, *cached, mask, scaling=module.scaling)[0])
    plain = own_attention(without.model.layers[1].self_attn, query, key, value, mask, scaling=module.scaling)[0]
    assert torch.equal(plain, eager_attention_forward(module, query, key, value, mask, scaling=module.scaling)[0])
    assert not torch.equal(output, plain)
    assert not torch.equal(model(IDS).logits, without(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama4_vision", "gpt_oss"])
def test_a_kept_factor_of_a_stack_is_that_of_its_expert(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Only TensorRT-LLM reads pre_quant_scale beside a stack, and experts here share one; files may say otherwise."""
    exported(sources[name], tmp_path / "made", "fp8")
    stack = {"llama4_vision": "language_model.model.layers.1.feed_forward", "gpt_oss": "model.layers.1.mlp"}[name]
    stack, scale = f"{stack}.experts", torch.rand(4, 48).to(torch.bfloat16) + 0.5
    held = altered(tmp_path / "made", lambda held: held.update({f"{stack}.down_proj_pre_quant_scale": scale}))
    number, linears = 2, load(tmp_path / "made").get_submodule(f"{stack.removeprefix('language_model.')}.down_proj")
    inputs = torch.randn(3, 48).to(torch.bfloat16)
    weight = held[f"{stack}.down_proj"][number].T.float() * held[f"{stack}.down_proj_weight_scale"]
    rounded = fp8.rounded(inputs * scale[number], held[f"{stack}.down_proj_input_scale"])
    bias = held[f"{stack}.down_proj_bias"][number].float() if name == "gpt_oss" else None
    expected = nn.functional.linear(rounded, weight, bias).to(torch.bfloat16)
    assert torch.equal(linears[number](inputs), expected)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.0.w1.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.input_scale"),
        ("mixtral", "+model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("llama4", "model.layers.1.feed_forward.experts.3.up_proj.weight_scale"),
        ("llama4_vision", "language_model.model.layers.1.feed_forward.experts.down_proj"),
        ("llama4_vision", "language_model.model.layers.1.feed_forward.experts.gate_up_proj_weight_scale"),
        ("llama4_vision", "+model.layers.1.feed_forward.experts.gate_up_proj"),
        ("llama4_vision", "language_model.model.norm.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_input_scale"),
        ("gpt_oss", "+model.layers.0.mlp.experts.down_proj_weight_scale_2"),
    ],
)
def test_what_is_missing_or_too_much_has_the_name_that_it_has_in_the_files(
    name: str, tensor: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    exported(sources[name], tmp_path / "made", "fp8")
    extra = tensor.removeprefix("+")
    add = {extra: torch.ones(4)} if extra != tensor else {}
    altered(tmp_path / "made", lambda held: held.update(add) if add else held.pop(tensor))
    said = "is not expected by this model and its quant_algo" if add else "is missing"
    assert refusal(load, tmp_path / "made") == f"{tmp_path / 'made'}: tensor {extra} {said}"


def test_a_stack_of_another_number_of_experts_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    exported(sources["gpt_oss"], tmp_path / "made", "nvfp4")
    name = "model.layers.2.mlp.experts.down_proj_weight_scale"
    altered(tmp_path / "made", lambda held: held.update({name: held[name][:3]}))
    with pytest.raises(ExportError, match=f"made: tensor {name} is of 3 experts, config.json has 4"):
        load(tmp_path / "made")


def test_experts_in_stacks_count_as_bits(sources: dict[str, Path], tmp_path: Path) -> None:
    exported(sources["gpt_oss"], tmp_path / "made", "fp8")
    weights = [tensor for tensor in tensors(tmp_path / "made").values() if tensor.dtype is torch.float8_e4m3fn]
    assert len(weights) == 4 * (4 + 2)
    assert bits_per_weight(tmp_path / "made") == 8 + 2 * 32 * len(weights) / sum(map(torch.numel, weights))


def test_verify_scores_an_export_of_mixtral(tmp_path: Path) -> None:
    source = make_model(tmp_path, "mixtral", vocab_size=read_json(EXAMPLE / "config.json")["vocab_size"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / file, source / file)
    exported(source, tmp_path / "fp8", "fp8")
    flags = ("--reference", source, "--text", EXAMPLE / "heldout.txt", "--windows", 2, "--device", "cpu", "--json")
    status, said = command_line("verify", tmp_path / "fp8", *flags)
    assert status == 0, said
    score = json.loads(said)["score"]
    assert 0 < score["divergence"] < score["worst"]
    assert score["perplexity"] == pytest.approx(score["reference"], rel=0.1)
    assert score["perplexity"] != score["reference"]
