"""Bad models and topologies: every rank stops within seconds, rank 0 says what, where and what to do; no file changes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_export.common.file_names import INDEX

from ..support.models import assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks
from ..support.refusals import DOWN, assert_says, configured, fp8, refused, rewritten
from .test_topologies import export

pytestmark = pytest.mark.whole

# What can be wrong with a source: what to do to it, and what must be said.


def replaced(file: str, text: str) -> Callable[[Path], None]:
    return lambda source: (source / file).write_text(text)


def holding(name: str, row: int, column: int, value: float) -> Callable[[Path], None]:
    return rewritten(lambda held: held[name][row, column].fill_(value))


def indexed(name: str, file: str) -> Callable[[Path], None]:
    """An index that says that tensor `name` is in `file`, and all others where they are."""

    def write(source: Path) -> None:
        places = dict.fromkeys(load_file(source / "model.safetensors"), "model.safetensors") | {name: file}
        replaced(INDEX, json.dumps({"weight_map": places}))(source)

    return write


def truncated(source: Path) -> None:
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 1000)


Q, SHARD = "model.layers.0.self_attn.q_proj.weight", "model.safetensors"
QUANTIZED = {"quant_method": "modelopt"}
LLAMAS = ["LlamaForCausalLm"]
SOURCES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("no model folder {}", "Give the path of an HF checkpoint")),
    "no config": (lambda source: (source / "config.json").unlink(), ("{} has no config.json", "Give a folder")),
    "config not JSON": (replaced("config.json", "{"), ("{}/config.json: not JSON", "Fetch it again")),
    "config a list": (replaced("config.json", "[]"), ("{}/config.json", "a list", "Fetch it again")),
    "misspelt": (configured(architectures=LLAMAS), ("'LlamaForCausalLm'", "Did you mean 'LlamaForCausalLM'?")),
    "no architecture": (configured(architectures=None), ("architecture '(none)'", "Known: LlamaForCausalLM, Qwen2")),
    "another kind": (
        replaced("config.json", '{"architectures": ["GPT2LMHeadModel"], "n_embd": 64}'),
        ("unknown architecture 'GPT2LMHeadModel'", "Known: LlamaForCausalLM"),
    ),
    "no layers": (configured(num_hidden_layers=None), ("config.json of a LlamaForCausalLM lacks num_hidden_layers",)),
    "a size in quotes": (configured(hidden_size="64"), ("hidden_size is '64', not a whole number",)),
    "heads that no group shares": (
        configured(num_key_value_heads=3),
        ("config.json: num_attention_heads 8 is not a multiple of num_key_value_heads 3",),
    ),
    "quantized": (configured(quantization_config=QUANTIZED), ("{} is quantized already", "give the original model")),
    "quantized unsaid": (
        rewritten(lambda held: held.update({Q: held[Q].to(torch.float8_e4m3fn)})),
        (f"{{}}: tensor {Q} is F8_E4M3, not one of BF16", "Give the original model"),
    ),
    "no weights": (lambda source: (source / SHARD).unlink(), ("{}: no weights", "Give a checkpoint in safetensors")),
    "index not JSON": (replaced(INDEX, "{"), (f"{{}}/{INDEX}: not the index", "Fetch it again")),
    "index empty": (replaced(INDEX, "{}"), (f"{{}}/{INDEX}: not the index", "weight_map", "Fetch it again")),
    "file missing": (
        indexed(Q, "b.safetensors"),
        ("{}/b.safetensors: not read (No such file", "Fetch this file again"),
    ),
    "not in its file": (indexed("model.x", SHARD), (f"{{}}/{SHARD}: the index says that model.x", "Fetch file and")),
    "tensor missing": (rewritten(lambda held: held.pop(Q)), (f"{{}}: tensor {Q} is missing", "Fetch the checkpoint")),
    "tensor too many": (
        rewritten(lambda held: held.update({"model.extra.weight": torch.zeros(1)})),
        ("{}: tensor model.extra.weight is not part of this architecture", "Give a model without it"),
    ),
    "wrong shape": (
        configured(intermediate_size=64),
        (f"{{}}: tensor {DOWN.format(3)} is (64, 96), but config.json means (64, 64)", "Give the config.json"),
    ),
    "wrong vocabulary": (
        configured(vocab_size=505),  # both are padded to 512
        ("{}: tensor model.embed_tokens.weight is (500, 64), but config.json means (505, 64)", "Give the config.json"),
    ),
    "truncated": (truncated, (f"{{}}/{SHARD}: not a readable safetensors file", "Fetch this file again")),
    "cut to nothing": (
        replaced(SHARD, ""),
        (f"{{}}/{SHARD}: not a readable safetensors file", "Fetch this file again"),
    ),
    "NaN, rank 0": (holding(Q, 0, 0, torch.nan), ("rank 0 failed to load the weights: {}: NaN or Inf in", Q)),
    "NaN, rank 1": (holding(Q, -1, 0, torch.nan), ("rank 1 failed to load the weights: {}: NaN or Inf in", Q)),
    "Inf, rank 1": (holding(DOWN.format(3), 0, -1, torch.inf), ("rank 1 failed", DOWN.format(3), "fetch or save")),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_bad_source_is_refused(case: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    damage, words = SOURCES[case]
    damage(source)
    said = refused(ranks, tmp_path, *fp8(source, output))
    assert_says(said, *(word.format(source) for word in words))


SIZES: dict[str, dict[str, int]] = {  # the first is the one that 2 does not divide
    "num_attention_heads": {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 70},
    "num_key_value_heads": {"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 96},
    "hidden_size": {"hidden_size": 63, "num_attention_heads": 7, "num_key_value_heads": 7},
    "intermediate_size": {"intermediate_size": 97},
    "num_hidden_layers": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("flag", ["--tp", "--pp"])
@pytest.mark.parametrize("key", SIZES)
def test_a_size_is_refused_only_where_tensor_parallelism_does_not_divide_it(
    key: str, flag: str, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    source = make_model(tmp_path, "llama32", **SIZES[key])
    flags = ("--hf-model", source, "--format", "bf16", "--output", output, flag, 2)
    if flag == "--tp" and key != "num_hidden_layers":
        said = refused(ranks, tmp_path, *flags)
        assert_says(said, f"{key} {SIZES[key][key]} does not divide by {flag} 2", f"Give a {flag} that divides it")
    else:
        export(ranks, 2, *flags)
        assert_same(tensors(output), tensors(source))


def test_inputs_that_no_block_divides_are_refused_and_the_way_out_works(
    output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    source = make_model(tmp_path, "qwen3", intermediate_size=72)
    flags = (*fp8(source, output), "--format", "nvfp4")
    said = refused(ranks, tmp_path, *flags)
    module = DOWN.format(3).removesuffix(".weight")
    assert_says(
        said, f"{module}.weight has 72 inputs, which blocks of 16 (nvfp4) do not divide", f"--exclude '{module}'"
    )
    export(ranks, 2, *flags, "--exclude", *(DOWN.format(layer).removesuffix(".weight") for layer in range(4)))
    assert module in read_json(output / "config.json")["quantization_config"]["ignore"]


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (1, 4), (2, 2)])
def test_a_world_that_is_not_tp_by_pp_by_dp_is_refused(
    tp: int, pp: int, source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    said = refused(ranks, tmp_path, *fp8(source, output), "--tp", tp, "--pp", pp)
    assert_says(said, "world size 2", f"--tp {tp} x --pp {pp} = {tp * pp}", f"--nproc-per-node {tp * pp}")
    export(ranks, 2, *fp8(source, output))
