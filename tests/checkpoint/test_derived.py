"""Checkpoints of Megatron that come alone: their own settings say what --hf-model would have said."""

import json
import shutil
from pathlib import Path
from textwrap import indent

import pytest
import torch
import yaml

from ..export.test_topologies import export
from ..support.command_line import command_line
from ..support.models import add_mtp, assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks, living
from ..support.saving import PLACE, saved_model

pytestmark = pytest.mark.whole

CHOSEN = {
    "llama32": "LlamaForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
OFTEN = ("llama32", "deepseek_v3")
SELDOM = (
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "glm4_moe",
    "minimax_m2",
    "qwen3_next",
    "mistral",
    "phi3",
    "deepseek_v32",
)
# The same in another spelling, and what only a tokenizer says.
BESIDE = {"rope_parameters", "rope_scaling", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
TRAINING = {"initializer_range", "router_aux_loss_coef", "original_max_position_embeddings"}
TOKENS = {
    "tokenizer_config.json": {"bos_token": None, "eos_token": {"content": "<end>"}, "pad_token": "<pad>"},
    "tokenizer.json": {
        "version": "1.0",
        "added_tokens": [{"id": 3, "content": "<end>"}, {"id": 4, "content": "<pad>"}],
    },
}


def made(name: str, base: Path, ranks: Ranks) -> Path:
    """A folder with the checkpoint of a model at TP 2, `saved`, and the HF model, `hf`."""
    base.mkdir(exist_ok=True)
    source = make_model(base, name)
    if name == "deepseek_v3":
        add_mtp(source)
    ranks.call(2, saved_model, source, base / "saved", {"tp": 2})
    shutil.move(source, base / "hf")
    return base


@pytest.fixture(scope="module")
def saved(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every model that is tried in each run, `made`."""
    return {name: made(name, tmp_path_factory.mktemp("derived") / name, living(pool)) for name in OFTEN}


def alone(folder: Path, name: str) -> tuple:
    chosen = ("--architecture", CHOSEN[name]) if name in CHOSEN else ()
    return ("--megatron-checkpoint", folder / "saved", *chosen, "--format", "fp8_pb")


def compare(name: str, folder: Path, ranks: Ranks, tmp_path: Path) -> None:
    """The export of a checkpoint alone, on one rank and at TP 2, is that with --hf-model."""
    given = ("--megatron-checkpoint", folder / "saved", "--hf-model", folder / "hf", "--format", "fp8_pb")
    export(ranks, 2, *given, "--tp", 2, "--output", tmp_path / "given")
    for world in (1, 2):
        out = tmp_path / f"alone{world}"
        said = export(ranks, world, *alone(folder, name), "--tp", world, "--output", out)
        assert_same(tensors(out), tensors(tmp_path / "given"))
        assert "config.json is made of what the arguments in the checkpoint say" in said
        assert "no tokenizer was given" in said
    found, meant = (read_json(tmp_path / kind / "config.json") for kind in ("alone2", "given"))
    there = {key for key in found.keys() & meant.keys() if meant[key] is not None} - BESIDE - TRAINING
    assert {"quantization_config", "vocab_size", "model_type"} <= there
    assert {key: found[key] for key in there} == {key: meant[key] for key in there}


@pytest.mark.parametrize("name", OFTEN)
def test_a_checkpoint_alone_is_exported_as_with_its_hf_model(
    name: str, saved: dict, ranks: Ranks, tmp_path: Path
) -> None:
    compare(name, saved[name], ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SELDOM)
def test_so_is_one_of_another_architecture(name: str, ranks: Ranks, tmp_path: Path) -> None:
    compare(name, made(name, tmp_path / "made", ranks), ranks, tmp_path)


def plan(folder: Path, *flags: object, status: int = 0) -> str:
    found, said = command_line("plan", "--megatron-checkpoint", folder / "saved", "--format", "bf16", *flags)
    assert found == status, said
    return said


def test_plan_prints_config_json_and_takes_tokens_from_a_tokenizer(saved: dict, tmp_path: Path) -> None:
    for name, said in TOKENS.items():
        (tmp_path / name).write_text(json.dumps(said))
    found = json.loads(plan(saved["deepseek_v3"], "--tokenizer", tmp_path, "--json"))["config"]
    meant = read_json(saved["deepseek_v3"] / "hf" / "config.json")
    assert [found[f"{one}_token_id"] for one in ("bos", "eos", "pad")] == [None, 3, 4]
    assert [found[key] for key in ("vocab_size", "n_routed_experts", "num_nextn_predict_layers")] == [500, 4, 1]
    assert found["architectures"] == meant["architectures"]
    rows = plan(saved["deepseek_v3"], "--config-value", "hidden_act=silu", "note=text", "more=[1.5]").splitlines()
    assert {"more: [1.5]", 'note: "text"', "kv_lora_rank: 32"} <= {row[18:] for row in rows}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "fit LlamaForCausalLM, MistralForCausalLM, Ministral3ForCausalLM and Phi3ForCausalLM alike. Choose"),
        (("--architecture", "LlamaForCausalLM", "--config-value", "num_hidden_layers=3"), "say num_layers = 4, but config.j"),
        (("--architecture", "LlamaForCausalLM", "--config-value", "eos_token_id=abc"), "give the number of a token, or a list"),
        (("--architecture", "LlamaForCausalLM", "--config-value", "eos_token_id=[]"), "give the number of a token, or a list"),
        (("--architecture", "LlamaForCausalLM", "--config-value", "eos_token_id=99999"), "--config-value: eos_token is number"),
        (("--architecture", "LlamaForCausalLM", "--config-value", "architectures=[]"), "is given with --architecture"),
        (("--architecture", "LlamaForCausalLM", "--config-value", "vocab_size=513"), "vocab_size is 513, but the embedding "),
        (("--architecture", "LlamaForCausalLM", "--config-value", "hidden_size=99999999"), "--config-value hidden_size: "),
        (("--architecture", "LlamaForCausalLM", "--tokenizer", "."), "has no tokenizer"),
        (("--architecture", "LlamaForCausalLM", "--tokenizer", "no/where"), "no model folder no/where, and the hub has none"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    flags: tuple, words: str, saved: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = plan(saved["llama32"], *flags, status=1)
    assert said.startswith("error: ")
    assert words in said, said


def test_a_tokenizer_of_more_tokens_is_refused(saved: dict, tmp_path: Path) -> None:
    for name, said in TOKENS.items():
        (tmp_path / name).write_text(json.dumps(said).replace('"id": 3', '"id": 512'))
    said = plan(saved["deepseek_v3"], "--tokenizer", tmp_path, status=1)
    assert "eos_token is number 512, but the model knows 500 tokens" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tokenizer", "x"), "--tokenizer has no effect without --megatron-checkpoint"),
        (("--megatron-checkpoint", "x", "--hf-model", "y", "--architecture", "z"), "--architecture has no effect with --hf-m"),
        (("--megatron-checkpoint", "x", "--config-value", "rope_theta"), "give KEY=VALUE, such as rope_theta=1000000"),
        (("--megatron-checkpoint", "x", "--config-value", "a=1", "a=2"), "each key once"),
    ],
    ids=str,
)  # fmt: skip
def test_flags_without_effect_are_bad_usage(flags: tuple, words: str, capsys: pytest.CaptureFixture) -> None:
    status, _ = command_line("plan", "--format", "bf16", *flags)
    assert (status, words in capsys.readouterr().err) == (2, True)


RUN = """
model:
  _target_: megatron.bridge.models.llama.LlamaModelProvider
  hf_model_id: org/it
  activation_func: {_target_: torch.nn.functional.silu, _call_: false}
  seq_length: 64
  rotary_base: 500000
"""


def test_run_config_yaml_says_it_where_there_are_no_arguments(saved: dict, tmp_path: Path) -> None:
    """Of the vocabulary it says nothing: then it is as large as the tensor, whose last rows are padding."""
    shutil.copytree(saved["llama32"] / "saved", tmp_path / "saved")
    place = tmp_path / "saved" / PLACE
    common = torch.load(place / "common.pt", weights_only=False)
    kept = {name: value for name, value in vars(common.pop("args")).items() if isinstance(value, int | float | str)}
    names = {"norm_epsilon": "layernorm_epsilon", "swiglu": "gated_linear_unit"}
    kept |= {new: kept.pop(old) for old, new in names.items()} | {"share_embeddings_and_output_weights": True}
    for name in ("vocab_size", "max_position_embeddings", "rotary_base"):
        del kept[name]
    torch.save(common, place / "common.pt")
    assert "it has neither arguments of Megatron-LM nor a run_config.yaml" in plan(tmp_path, status=1)
    (place / "run_config.yaml").write_text(RUN + indent(yaml.safe_dump(kept), "  "))
    found = json.loads(plan(tmp_path, "--json"))
    assert found["config"]["architectures"] == ["LlamaForCausalLM"]
    assert [found["config"][key] for key in ("max_position_embeddings", "vocab_size", "rope_theta")] == [64, 512, 5e5]
    assert any("vocab_size is 512, as the embedding has rows" in remark for remark in found["remarks"])
    assert "--hf-model (it was made of 'org/it')" in plan(tmp_path, "--architecture", "Qwen3ForCausalLM", status=1)
