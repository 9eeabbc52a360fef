"""Verdicts on drafts beside their base: those that ModelOpt wrote, ones that all engines load, and ones damaged in one way each."""

import copy
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_export.engines import DRAFTS, ENGINES, CheckpointView, Effect, verdict_of
from megatron_export.planning.engine_check import verdicts

from ..support import draft_headers as drafts
from ..support.checkpoints import Change, Said, adding, configured, described, golden, losing, storing, written
from ..support.command_line import command_line
from ..support.draft_headers import (
    COMBINED,
    COMBINED_FP8,
    DEEP,
    DOWN,
    HEADERS,
    IGNORED,
    SMALLER,
    Q,
    base,
    changed,
    coded,
    deep,
    fp8_fc,
    golden_draft,
    heads,
    in_config_alone,
    in_file_alone,
    in_nvfp4,
    listing,
    narrowed,
    plain,
    renamed,
    said_of_base,
    second_block,
    spell,
    spell_older,
    whole,
)
from .test_rules import JUNK, places

BASE = base()
MIX = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {Q: {"quant_algo": "FP8"}, DOWN: {"quant_algo": "NVFP4"}}}
Case = tuple[Callable[[], Said], tuple[Change, ...], CheckpointView | None, dict, str, str, str]


def combined() -> Said:
    return golden_draft(COMBINED_FP8)


def no_longer(*keys: str) -> Change:
    """Keys of config.json are gone."""
    return lambda said: [said["config"].pop(key) for key in keys]


def drop_group_size(said: Said) -> None:
    del said["quant"]["quantization"]["group_size"]


def plain_keys(said: Said) -> None:
    """q, k and v in bfloat16."""
    for part, rows in (("q", 128), ("k", 64), ("v", 64)):
        name = f"layers.0.self_attn.{part}_proj"
        losing(f"{name}.weight_scale", f"{name}.input_scale")(said)
        storing(f"{name}.weight", "BF16", rows, 256)(said)


def other_list(said: Said) -> None:
    said["quant"]["quantization"]["exclude_modules"] = [*IGNORED, "nothing"]


def other_algorithm(said: Said) -> None:
    said["quant"]["quantization"]["quant_algo"] = "NVFP4"


def lose_a_file(said: Said) -> None:
    said["index"] = {"norm.weight": "model.safetensors", "d2t": "lost.safetensors"}


EAGLE_1 = (configured(architectures=["LlamaForCausalLM"]), no_longer("eagle_config", "draft_vocab_size"),
    losing("layers.0.hidden_norm.weight"))  # fmt: skip
NARROW = (configured(target_hidden_size=256), storing("fc.weight", "BF16", 128, 512))
ANOTHER = {"quant_method": "gptq", "producer": {}}
# A draft, what is done to it, its base, what is asked, and the rules that vLLM, SGLang and TensorRT-LLM find, the worst first.
# fmt: off
CASES: dict[str, Case] = {
    "plain": (plain, (), BASE, {},
        "", "", "aux argument"),
    "in FP8": (coded, (), BASE, {},
        "", "", "aux argument"),
    "in NVFP4": (plain, (in_nvfp4,), BASE, {},
        "", "", "aux argument, machine"),
    "in NVFP4, on Hopper": (plain, (in_nvfp4,), BASE, {"gpu": "h200"},
        "", "", "gpu, aux argument"),
    "two layers": (deep, (), BASE, {},
        "", "", "aux argument"),
    "all tokens": (whole, (), BASE, {},
        "", "", "aux argument"),
    "no base": (coded, (), None, {},
        "base", "base", "base, aux argument"),
    "called midlayer": (coded, (renamed(lambda name: name.replace("layers.0.", "midlayer.")),), BASE, {},
        "", "", "aux argument"),
    "called midlayer, two": (deep, (renamed(lambda name: name.replace("layers.", "midlayer.")),), BASE, {},
        "midlayer", "midlayer", "aux argument"),
    "called model": (plain, (renamed(lambda name: name if name in ("lm_head.weight", "d2t") else f"model.{name}"),), BASE, {},
        "missing, unknown", "", "missing, unknown, aux argument"),
    "fc in FP8": (coded, (fp8_fc,), BASE, {},
        "", "fc", "aux argument"),
    "fc forgotten": (coded, (spell("lm_head"),), BASE, {},
        "not left out", "", "not left out, aux argument"),
    "lm_head forgotten": (coded, (spell("*fc"),), BASE, {},
        "not left out", "not left out", "aux argument"),
    "everything left out": (coded, (spell(*IGNORED, "model*"),), BASE, {},
        "excludes all", "excludes all", "excludes all, aux argument"),
    "something left out": (coded, (spell(*IGNORED, "*down_proj"),), BASE, {},
        "left out", "left out", "left out, aux argument"),
    "left out by vLLM's number": (coded, (spell(*IGNORED, "model.layers.8.mlp.down_proj"),), BASE, {},
        "left out", "", "aux argument"),
    "a part left out": (coded, (spell(*IGNORED, "model.layers.8.self_attn.q_proj", "q_proj"),), BASE, {},
        "", "partly", "aux argument"),
    "q, k and v plain, and left out by name": (
        coded, (plain_keys, spell(*IGNORED, *(f"model.layers.8.self_attn.{part}_proj" for part in "qkv"))), BASE, {},
        "not left out", "not left out", "not left out, aux argument"),
    "q, k and v plain, and left out as joined": (coded, (plain_keys, spell(*IGNORED, "*qkv_proj")), BASE, {},
        "", "", "not left out, aux argument"),
    "spelled as of old": (coded, (spell_older,), BASE, {},
        "", "older", "aux argument"),
    "spelled as of old, in four bits": (plain, (in_nvfp4, spell_older, drop_group_size), BASE, {},
        "config", "older", "aux argument, machine"),
    "spelled as of old, in int4": (coded, (spell(*IGNORED, quant_algo="W4A16_AWQ"), spell_older), BASE, {},
        "config", "algorithm", "shape, scale, dtype, aux argument, extra"),
    "the file alone": (plain, (in_nvfp4, drop_group_size, in_file_alone), BASE, {},
        "config", "config", "aux argument, machine"),
    "the method forgotten": (coded, (lambda said: said["config"]["quantization_config"].pop("quant_method"),), BASE, {},
        "dialect", "", "aux argument"),
    "another method": (coded, (in_config_alone(**ANOTHER),), BASE, {},
        "another", "another", "another"),
    "other blocks": (coded, (in_config_alone(quant_method="fp8", weight_block_size=[64, 64]),), BASE, {},
        "another", "another", "another"),
    "no config": (coded, (in_config_alone(), in_file_alone), BASE, {},
        "unquantized", "unquantized", "unquantized, aux argument"),
    "in int4": (coded, (spell(*IGNORED, quant_algo="W4A16_AWQ"),), BASE, {},
        "algorithm", "algorithm", "shape, scale, dtype, aux argument, extra"),
    "in nobody's algorithm": (coded, (spell(*IGNORED, quant_algo="INT3"),), BASE, {},
        "algorithm", "algorithm", "algorithm, aux argument"),
    "mixed": (coded, (spell(*IGNORED, **MIX, kv_cache_quant_algo=None),), BASE, {},
        "mixed", "mixed", "mixed, aux argument"),
    "mixed, in config.json": (coded, (spell(*IGNORED, **MIX), in_config_alone()), BASE, {},
        "mixed", "no cache said", "mixed, aux argument"),
    "nothing mixed": (coded, (spell(*IGNORED, **MIX | {"quantized_layers": {}}),), BASE, {},
        "mixed", "mixed", "mixed, aux argument"),
    "a scale lost": (coded, (losing(f"{DOWN}.weight_scale"),), BASE, {},
        "scale", "scale", "scale, aux argument"),
    "stored in integers": (coded, (storing(f"{DOWN}.weight", "I8", 128, 256),), BASE, {},
        "dtype", "dtype", "dtype, aux argument"),
    "a factor too many": (coded, (storing(f"{DOWN}.pre_quant_scale", "BF16", 256),), BASE, {},
        "extra", "", "aux argument, extra"),
    "a scale too many": (coded, (storing(f"{DOWN}.weight_scale_2", "F32"),), BASE, {},
        "extra", "extra", "aux argument, extra"),
    "a weight cut": (coded, (storing(f"{DOWN}.weight", "F8_E4M3", 64, 256),), BASE, {},
        "shape", "shape", "shape, aux argument"),
    "a weight cut, plain": (plain, (storing(f"{DOWN}.weight", "BF16", 64, 256),), BASE, {},
        "shape", "shape", "shape, aux argument"),
    "a norm lost": (plain, (losing("norm.weight"),), BASE, {},
        "missing", "missing", "missing, aux argument"),
    "no fc": (plain, (losing("fc.weight"),), BASE, {},
        "missing", "missing", "missing, aux argument"),
    "vLLM's norm lost": (deep, (losing("layers.1.input_layernorm.weight"),), BASE, {},
        "norms", "", "aux argument"),
    "the others' norm lost": (lambda: coded(DEEP), (), BASE, {},
        "", "norms", "norms, aux argument"),
    "a stray tensor": (plain, (storing("eagle_module.more", "BF16", 4),), BASE, {},
        "unknown", "unknown", "unknown, aux argument"),
    "a tensor twice": (plain, (adding("other.safetensors", **{"norm.weight": ["BF16", [128]]}),), BASE, {},
        "twice", "twice", "twice, aux argument"),
    "Mistral's file": (plain, (adding("consolidated.safetensors", **{"output.weight": ["BF16", [8, 8]]}),), BASE, {},
        "consolidated, unknown", "consolidated, unknown", "consolidated, unknown, aux argument"),
    "a file lost": (plain, (lose_a_file,), BASE, {},
        "files", "files", "files, aux argument"),
    "d2t lost": (coded, (losing("d2t"),), BASE, {},
        "d2t", "d2t", "d2t, aux argument"),
    "d2t without use": (whole, (storing("d2t", "I64", 512),), BASE, {},
        "d2t idle", "", "aux argument"),
    "d2t in bfloat16": (plain, (storing("d2t", "BF16", 256),), BASE, {},
        "dtype", "dtype", "dtype, aux argument"),
    "d2t of all tokens": (plain, (storing("d2t", "I64", 512),), BASE, {},
        "shape", "shape", "shape, aux argument"),
    "lm_head lost": (plain, (losing("lm_head.weight"),), BASE, {},
        "head", "head", "head, aux argument"),
    "lm_head lost, all tokens": (whole, (losing("lm_head.weight"),), BASE, {},
        "", "head", "aux argument"),
    "lm_head of the base": (whole, (losing("lm_head.weight"), configured(draft_vocab_size=None)), BASE, {},
        "", "", "class"),
    "ModelOpt's class of several layers": (plain, (configured(architectures=["LlamaForCausalLMEagle3Deep"]),), BASE, {},
        "class", "class", "class"),
    "no class": (plain, (configured(architectures=[]),), BASE, {},
        "class", "class", "class"),
    "the class of a model": (plain, (configured(architectures=["LlamaForCausalLM"]),), BASE, {},
        "", "class", "aux argument"),
    "vLLM's class": (plain, (configured(architectures=["Eagle3LlamaForCausalLM"]),), BASE, {},
        "", "class", "aux argument"),
    "Qwen's class": (plain, (configured(architectures=["Eagle3Qwen3ForCausalLM"]),), BASE, {},
        "architecture", "class", "class"),
    "DeepSeek's class": (plain, (configured(architectures=["Eagle3DeepseekV2ForCausalLM"]),), BASE, {},
        "architecture", "architecture", "class"),
    "TensorRT-LLM's DeepSeek": (plain, (configured(architectures=["Eagle3DeepSeekV3ForCausalLM"]),), BASE, {},
        "class", "class", "architecture"),
    "the first EAGLE": (plain, EAGLE_1, BASE, {},
        "draft", "draft", "draft"),
    "another vocabulary": (plain, (), base(vocab_size=1024), {},
        "vocabulary", "vocabulary", "vocabulary, aux argument"),
    "another width": (plain, (), base(hidden_size=256), {},
        "hidden", "hidden", "hidden, aux argument"),
    "a wider base": (plain, NARROW, base(hidden_size=256), {},
        "embedding", "embedding", "embedding, aux argument"),
    "a wider base, embedded": (plain, (*NARROW, storing("embed_tokens.weight", "BF16", 512, 128)), base(hidden_size=256), {},
        "", "", "aux argument"),
    "of Mixtral": (plain, (), base(architectures=["MixtralForCausalLM"]), {},
        "target", "target", "target"),
    "of GLM": (plain, (), base(architectures=["Glm4MoeForCausalLM"]), {},
        "target", "", "target"),
    "of GPT-OSS, its last layer": (plain, (), base(architectures=["GptOssForCausalLM"], num_hidden_layers=2), {},
        "", "", ""),
    "another rotation": (plain, (configured(rope_theta=500000.0),), BASE, {},
        "positions", "positions", "positions, aux argument"),
    "ModelOpt's own": (lambda: golden_draft(SMALLER), (), BASE, {},
        "aux shift, positions", "positions", "positions, aux argument"),
    "no layers listed": (plain, (configured(eagle_config={}),), BASE, {},
        "aux", "aux", "aux"),
    "three layers listed": (plain, (listing(1, 4, 6),), BASE, {},
        "aux", "aux", "aux, aux argument"),
    "a layer listed twice": (plain, (listing(1, 1),), BASE, {},
        "aux", "aux", "aux, aux argument"),
    "a layer outside": (plain, (listing(1, 8),), BASE, {},
        "aux layers", "aux layers", "aux layers, aux argument"),
    "the last layer": (plain, (listing(1, 7),), BASE, {},
        "", "aux layers", "aux argument"),
    "outputs for inputs": (plain, (listing(1, 3, inputs=(1, 3)),), BASE, {},
        "aux shift", "", "aux argument"),
    "the default layers": (whole, (listing(1, 3, 4), storing("fc.weight", "BF16", 128, 384)), BASE, {},
        "", "", ""),
    "on three GPUs": (coded, (), BASE, {"tp": 3},
        "heads", "heads", "heads, aux argument"),
    "on two GPUs": (plain, (narrowed(48),), BASE, {"tp": 2},
        "shared", "shared", "shared, aux argument, machine"),
    "on a T4": (coded, (), BASE, {"gpu": "t4"},
        "gpu", "gpu", "gpu, aux argument"),
    "in four bits on a T4": (plain, (in_nvfp4,), BASE, {"gpu": "t4"},
        "", "gpu", "gpu, aux argument"),
    "in blocks": (coded, (spell(*IGNORED, quant_algo="FP8_PB_WO"),), BASE, {},
        "shape, extra", "algorithm", "scale, aux argument, extra, case"),
    "in blocks, of old": (coded, (spell(*IGNORED, quant_algo="FP8_PB_WO"),), BASE, {"version": "1.2"},
        "shape, extra, version", "algorithm, version", "old, aux argument, version"),
    "two lists": (coded, (other_list,), BASE, {},
        "", "", "aux argument, two configs"),
    "two algorithms": (coded, (other_algorithm,), BASE, {},
        "", "", "scale, dtype, aux argument, two configs, machine"),
    "a cache in four bits": (coded, (in_config_alone(kv_cache_scheme="NVFP4"),), BASE, {},
        "", "", "aux argument"),
    "Medusa": (heads, (), BASE, {},
        "tokens", "medusa", "alone"),
    "Medusa, two blocks": (heads, (second_block,), BASE, {},
        "tokens", "medusa", "alone"),
    "Medusa, no base": (heads, (), None, {},
        "base, tokens", "medusa", "alone"),
    "Medusa in 0.33": (heads, (), BASE, {"version": "0.33"},
        "gone", "medusa, version", "alone, version"),
    "Medusa, biases unsaid": (heads, (no_longer("medusa_fc_bias"),), BASE, {},
        "bias, tokens", "medusa", "alone"),
    "Medusa, a block in codes": (heads, (storing("medusa_heads.0.0.linear.weight", "F8_E4M3", 128, 128),), BASE, {},
        "codes, tokens", "medusa", "alone"),
    "Medusa, an output layer in codes": (heads, (storing("medusa_heads.0.1.weight", "F8_E4M3", 512, 128),), BASE, {},
        "codes, tokens", "medusa", "alone"),
    "Medusa, blocks miscounted": (heads, (configured(num_medusa_layers=2),), BASE, {},
        "blocks, tokens", "medusa", "alone"),
    "Medusa, a bias lost": (heads, (losing("medusa_heads.1.0.linear.bias"),), BASE, {},
        "missing, tokens", "medusa", "alone"),
    "Medusa, a block cut": (heads, (storing("medusa_heads.1.0.linear.weight", "BF16", 64, 128),), BASE, {},
        "shape, tokens", "medusa", "alone"),
    "Medusa, another vocabulary": (heads, (), base(vocab_size=1024), {},
        "vocabulary, tokens", "medusa", "alone"),
    "Medusa, another width": (heads, (), base(hidden_size=256), {},
        "hidden, tokens", "medusa", "alone"),
    "Medusa and base": (combined, (), None, {},
        "combined", "medusa", "flow"),
    "Medusa and base, plain": (lambda: golden_draft(COMBINED), (), None, {},
        "combined", "medusa", "dtype, flow"),
    "Medusa and base in 0.33": (combined, (), None, {"version": "0.33"},
        "gone", "medusa, version", "flow, version"),
    "Medusa and base, a bias lost": (combined, (losing("medusa_heads.1.0.linear.bias"),), None, {},
        "combined", "medusa", "scale, flow"),
    "Medusa and base, a scale lost": (combined, (losing("medusa_heads.1.1.input_scale"),), None, {},
        "combined", "medusa", "scale, flow"),
    "Medusa and base, tensors lost": (combined, (losing("model.norm.weight", "medusa_heads.0.1.weight"),), None, {},
        "combined", "medusa", "missing, flow"),
    "Medusa and base, a stray tensor": (combined, (storing("more.weight", "BF16", 2),), None, {},
        "combined", "medusa", "unknown, flow"),
    "Medusa and base, a tensor twice": (combined, (adding("more.safetensors", **{"model.norm.weight": ["BF16", [128]]}),), None, {},
        "combined", "medusa", "twice, flow"),
    "Medusa and base, miscounted": (combined, (configured(medusa={"num_medusa_heads": 4, "num_medusa_layers": 1}),), None, {},
        "combined", "medusa", "counts, flow"),
    "Medusa and base, uncounted": (combined, (no_longer("medusa"),), None, {},
        "combined", "medusa", "counts, flow"),
    "Medusa and Mixtral": (combined, (configured(architectures=["MedusaMixtralForCausalLM"]),), None, {},
        "combined", "medusa", "medusa base, unknown, flow"),
    "Medusa and base, two blocks": (combined, (second_block,), None, {},
        "combined", "medusa", "blocks, flow"),
}
# fmt: on
# What ModelOpt wrote, beside the base of two layers that it was made with -> what each engine finds.
YARN = "positions"
GOLDEN = {
    "bad-draft-llama-eagle3d-bf16-mcore-tp2": ("shape, d2t, aux shift", "shape, aux layers, d2t", "shape, d2t"),
    "draft-llama-eagle3-FP8457": (f"aux shift, {YARN}", f"aux layers, fc, older, {YARN}", YARN),
    "draft-llama-eagle3-bf16457": (f"aux shift, {YARN}", f"aux layers, {YARN}", YARN),
    "draft-llama-eagle3d-FP8-mcore": (
        "d2t, unquantized, aux shift",
        "aux layers, d2t, unquantized",
        "d2t, unquantized",
    ),
    "draft-llama-eagle3d-FP8457": (f"aux shift, {YARN}", f"aux layers, fc, older, {YARN}", YARN),
    "draft-llama-eagle3d-FP8DRAFT457": (
        f"excludes all, aux shift, {YARN}",
        f"aux layers, fc, older, {YARN}",
        f"excludes all, {YARN}",
    ),
    "draft-llama-eagle3d-bf16457": (f"aux shift, {YARN}", f"aux layers, {YARN}", YARN),
    "draft-llama-eagle3deep-FP8457": (f"aux shift, {YARN}", f"norms, aux layers, fc, older, {YARN}", f"norms, {YARN}"),
    "draft-llama-medusa-FP8": ("combined", "medusa", "flow"),
    "draft-llama-medusa-bf16": ("combined", "medusa", "dtype, flow"),
    "draft-qwen3-eagle3d-FP8457": (f"aux shift, {YARN}", f"aux layers, fc, older, {YARN}", YARN),
}
# fmt: on


def found(checkpoint: CheckpointView, beside: CheckpointView | None, asked: dict) -> tuple[str, ...]:
    """The rules that each engine finds, the worst first."""
    judged = [verdict_of(checkpoint, engine, base=beside, **asked) for engine in ENGINES]
    return tuple(", ".join(dict.fromkeys(one.rule for one in verdict.findings)) for verdict in judged)


def of_case(case: str) -> Said:
    make, changes, *_ = CASES[case]
    return changed(make(), *changes)


@pytest.mark.parametrize("case", CASES)
def test_a_draft_has_these_findings_and_no_others(case: str) -> None:
    _, _, beside, asked, *expected = CASES[case]
    assert found(described(of_case(case)), beside, asked) == tuple(expected)


def test_every_draft_of_modelopt_has_its_verdict() -> None:
    assert HEADERS.keys() == GOLDEN.keys()
    for name, expected in GOLDEN.items():
        trained_with = described(golden(f"models/{'qwen3' if 'qwen3' in name else 'llama'}-bf16"))
        beside = None if "medusa" in name else trained_with
        assert (name, found(described(golden_draft(name)), beside, {})) == (name, expected)


def test_every_rule_of_drafts_is_found_in_a_draft() -> None:
    seen = {engine: Counter() for engine in ENGINES}
    for row in [*GOLDEN.values(), *(case[4:] for case in CASES.values())]:
        for engine, rules in zip(ENGINES, row, strict=True):
            seen[engine].update(rules.split(", "))
    assert [(engine, rule) for engine in ENGINES for rule in DRAFTS[engine].RULES if not seen[engine][rule]] == []


@pytest.mark.parametrize(
    ("case", "engine", "says"),
    [
        ("fc in FP8", "sglang", "refused: fc: it is F8_E4M3: its codes are taken for numbers, and its scales skipped"),
        ("d2t lost", "vllm", "refused: d2t: it is not there, and the draft knows 256 of 512 tokens: nothing says which"),
        ("everything left out", "vllm", "refused: model* in ignore leaves out every linear, and they are stored in codes"),
        ("the last layer", "sglang", "refused: it hands out layers 0 to 6 of this base, and config.json lists 7"),
        ("ModelOpt's own", "vllm", 'set "eagle_aux_hidden_state_layer_ids": [1, 2] in config.json, beside eagle_config'),
        ("the others' norm lost", "tensorrt_llm", "refused: layers.1.hidden_norm.weight: it is not there"),
        ("another vocabulary", "sglang", "refused: vocab_size is 512 in the draft's config.json, and 1024 in the base's"),
        ("no base", "vllm", "loads: give its base with --with: vocabulary, hidden size and layers were not compared with it"),
        ("Medusa, biases unsaid", "vllm", 'it skips biases (set "medusa_fc_bias": true in config.json)'),
        ("Medusa in 0.33", "vllm", "refused: 0.33.0 has no Medusa (serve with 0.32, or draft with EAGLE-3)"),
        ("Medusa and base, two blocks", "tensorrt_llm", "heads have 2 blocks, and it reads the scales of the last one alone"),
    ],
)  # fmt: skip
def test_a_verdict_says_why(case: str, engine: str, says: str) -> None:
    _, _, beside, asked, *_ = CASES[case]
    assert says in verdict_of(described(of_case(case)), engine, base=beside, **asked).text


def test_check_judges_a_draft_with_its_base(tmp_path: Path) -> None:
    draft, model = written(coded(), tmp_path / "draft"), written(said_of_base(), tmp_path / "base")
    status, text = command_line("check", draft, "--with", model)
    assert (status, text.splitlines()[:2]) == (0, ["vLLM 0.32.0: loads", "SGLang 0.5.23: loads"])
    status, text = command_line("check", draft)
    assert status == 0 and text.count("give its base with --with") == 3
    other = written(said_of_base(vocab_size=1024), tmp_path / "other")
    assert command_line("check", draft, "--with", other)[0] == 1


def test_a_base_is_for_drafts_alone_and_no_draft(tmp_path: Path) -> None:
    draft, model = written(coded(), tmp_path / "draft"), written(said_of_base(), tmp_path / "base")
    both = written(combined(), tmp_path / "both")
    assert "--with: this is no draft of EAGLE-3 or Medusa" in command_line("check", model, "--with", model)[1]
    assert (
        "have their base in one folder with them. Leave out --with" in command_line("check", both, "--with", model)[1]
    )
    assert f"--with: {draft} is a draft too" in command_line("check", draft, "--with", draft)[1]
    assert command_line("check", "--rules", "--with", model)[0] == 2
    assert "SGLang 0.5.23, drafts" in command_line("check", "--rules")[1]


def test_live_states_of_drafts_are_no_checkpoints(tmp_path: Path) -> None:
    """As three folders of goldens are: shards of ranks, and no config.json."""
    folder = written(coded(), tmp_path / "draft")
    (folder / "config.json").unlink()
    assert "has no config.json. Give the folder of a checkpoint" in command_line("check", folder)[1]


def test_no_draft_however_odd_breaks_the_rules() -> None:
    dice = random.Random(7)
    for _ in range(400):
        said = dice.choice([plain, coded, deep, heads, combined])()
        for _ in range(dice.choice((1, 2))):
            at, key = dice.choice(list(places(dice.choice([one for one in (said["config"], said["quant"]) if one]))))
            at[key] = copy.deepcopy(dice.choice(JUNK))
        held = drafts.tensors(said)
        shape = dice.choice(([], [0], [1], [3, 5], [2, 2, 2], [0, 128]))
        held[dice.choice(list(held))] = [dice.choice(("F32", "U8", "F8_E4M3", "BOOL")), shape]
        held[dice.choice(("weight", "midlayer.0.weight", "medusa_heads.9.9.weight", "layers.x.fc.weight"))] = [
            "U8",
            [4, 4],
        ]
        asked = {"gpu": dice.choice((None, "h200", "t4")), "tp": dice.choice((1, 3, 8))}
        judged = verdicts(described(said), **asked, base=dice.choice((None, BASE)))
        assert all(verdict.effect in Effect for verdict in judged.values())
