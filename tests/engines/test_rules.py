"""The engines' rules: what ModelOpt wrote, checkpoints damaged in one way each, and how names are matched."""

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_export import ExportError
from megatron_export.engines import DRAFTS, ENGINES, CheckpointView, Effect, runs, verdict_of
from megatron_export.engines import exclude_lists as matching
from megatron_export.engines.architectures import ARCHITECTURES
from megatron_export.formats import Options
from megatron_export.planning.engine_check import lines, of_folder, refusals, rules, verdicts

from ..support.checkpoints import (
    DAMAGES,
    FP8,
    HEADERS,
    NVFP4,
    Said,
    damaged,
    described,
    golden,
    losing,
    planned,
    storing,
    written,
)
from ..support.command_line import command_line
from ..support.configs import (
    GLM5,
    KIMI,
    LLAMA,
    LLAMA4,
    LLAMA4_SEES,
    MINIMAX,
    MINISTRAL3,
    MISTRAL3,
    MIXTRAL,
    PHI3,
    QWEN,
    QWEN_MOE,
    SMALL_V3,
)
from ..support.live import refusal
from ..support.plans import plan_of
from .hybrid_cases import CASES as HYBRIDS

LLAMA4_NAME = {"architectures": ["Llama4ForCausalLM"]}
GPT_OSS = MIXTRAL | {"architectures": ["GptOssForCausalLM"], "sliding_window": 8, "head_dim": 32}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 32, "max_position_embeddings": 64}
MODELOPT = Options(fp8_pb_spelling="modelopt")
# What ModelOpt wrote -> the first rule that vLLM, SGLang and TensorRT-LLM find broken, or mind; '' for none.
# fmt: off
USUAL = {
    "FP8":             ("", "", ""),
    "FP8-KVFP8":       ("", "", "kv fp8"),
    "FP8-mcore":       ("", "", ""),
    "FP8_PB_WO":       ("shape", "algorithm", ""),
    "INT4_AWQ":        ("algorithm", "algorithm", ""),
    "NVFP4":           ("", "", "machine"),
    "NVFP4-KVNVFP4":   ("kv nvfp4", "kv nvfp4", "machine"),
    "NVFP4_AWQ":       ("algorithm", "awq", "machine"),
    "W4A8_AWQ":        ("algorithm", "algorithm", "machine"),
    "bf16":            ("unknown", "unknown", "unknown"),  # token ids beside the weights
}
GOLDEN = {f"models/{name}-{form}": said for name in ("llama", "qwen3", "qwen3moe") for form, said in USUAL.items()}
del GOLDEN["models/qwen3moe-W4A8_AWQ"]
GOLDEN |= {
    "models/qwen3-FP8-KVFP8":           ("", "kv ignored", "kv fp8"),
    "models/qwen3-FP8-mcore":           ("not left out", "", ""),
    "models/qwen3-NVFP4-KVNVFP4":       ("kv nvfp4", "kv ignored", "machine"),
    "models/qwen3moe-FP8-KVFP8":        ("", "kv ignored", "kv fp8"),
    "models/qwen3moe-INT4_AWQ":         ("algorithm", "algorithm", "expert int4"),
    "models/qwen3moe-FP8_PB_WO":        ("shape", "algorithm", "block experts"),
    "models/qwen3moe-NVFP4-KVNVFP4":    ("kv nvfp4", "kv ignored", "machine"),
    "models/deepseekv3-FP8":            ("bias", "bias", "latent"),
    "models/deepseekv3-FP8-KVFP8":      ("bias", "bias", "latent"),
    "models/deepseekv3-FP8-mcore":      ("bias", "latent scale", "latent"),
    "models/deepseekv3-INT4_AWQ":       ("algorithm", "algorithm", "expert int4"),
    "models/deepseekv3-NVFP4":          ("bias", "latent", "latent"),
    "models/deepseekv3-NVFP4-KVNVFP4":  ("bias", "latent", "latent"),
    "models/deepseekv3-NVFP4_AWQ":      ("algorithm", "awq", "latent"),
    "models/deepseekv3-W4A8_AWQ":       ("algorithm", "algorithm", "latent"),
    "models/deepseekv3-bf16":           ("unknown", "bias", "unknown"),
    "bad/llama-FP8-mcore-tp2pp1ep1":    ("shape", "shape", "shape"),
    "bad/llama-INT4_AWQ-mcore":         ("unquantized", "unquantized", "unquantized"),
    "bad/qwen3moe-FP8-mcore-tp1pp1ep2": ("experts", "experts", "experts"),
}
# fmt: on


def found(checkpoint: CheckpointView, *engines: str, **asked: str | int) -> list[list[str]]:
    """The rules that each engine finds, the worst first; of these engines, or of all."""
    verdicts = [verdict_of(checkpoint, engine, **asked) for engine in engines or ENGINES]
    return [[finding.rule for finding in verdict.findings] for verdict in verdicts]


def test_every_golden_checkpoint_has_its_verdict() -> None:
    assert HEADERS.keys() == GOLDEN.keys()
    judgements = {name: tuple((broken or [""])[0] for broken in found(described(golden(name)))) for name in GOLDEN}
    assert judgements == GOLDEN


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_found_out(damage: str) -> None:
    _, _, *expected, _ = DAMAGES[damage]
    for broken, rule in zip(found(described(damaged(damage))), expected, strict=True):
        assert rule in broken if rule else set(broken) <= {"machine"}


def store_the_last_layer_plain(said: CheckpointView) -> CheckpointView:
    """Of a layer that predicts one more token, all linears in bfloat16, and none of them left out."""
    [file] = said.files
    tensors = dict(said.files[file])
    for name in [name for name in tensors if name.startswith("model.layers.4.")]:
        header = tensors.pop(name)
        if not name.endswith(("scale", "scale_2")):
            tensors[name] = header._replace(dtype="BF16", shape=said.expected.get(name, header.shape))
    return replace(said, files={file: tensors})


def reconfigured(said: CheckpointView, **changes: object) -> CheckpointView:
    return replace(said, config=said.config | changes)


def alter(said: CheckpointView, **quantization: object) -> CheckpointView:
    """Another word in both configs."""
    nested = {"quantization": said.quant["quantization"] | quantization}
    flat = said.config["quantization_config"] | quantization
    return reconfigured(replace(said, quant=nested), quantization_config=flat)


def with_factors(said: Said) -> Said:
    storing(f"{ATTENTION}.q_proj.pre_quant_scale", "BF16", 128)(said)
    return said


def without_an_input(said: Said) -> Said:
    losing("model.layers.0.mlp.experts.1.up_proj.input_scale")(said)
    return said


def without_routing(said: CheckpointView) -> CheckpointView:
    return replace(said, config={key: value for key, value in said.config.items() if key != "use_routing_bias"})


OTHERS = {  # more checkpoints, so that every rule is found somewhere
    "windows": lambda: found(planned(MISTRAL, format="fp8")),
    "gpt-oss": lambda: found(planned(GPT_OSS, format="fp8")),
    "eight GPUs": lambda: found(planned(LLAMA, format="fp8_pb"), tp=8),
    "five GPUs": lambda: found(planned(LLAMA, format="fp8_pb"), tp=5),
    "mixtral": lambda: found(planned(MIXTRAL, format="fp8", kv_cache="fp8")),
    "native with cache": lambda: found(planned(QWEN_MOE, format="fp8_pb", kv_cache="fp8")),
    "llama 4": lambda: found(planned(LLAMA4_SEES, format="nvfp4")),
    "llama 4, stacked as one that sees": lambda: found(
        replace(planned(LLAMA4_SEES, format="fp8"), config=planned(LLAMA4, format="fp8").config)
    ),
    "llama 4, in blocks": lambda: found(planned(LLAMA4, format="fp8_pb")),
    "llama 4, keys in four bits": lambda: found(reconfigured(planned(LLAMA, format="nvfp4"), architectures=["Llama4ForCausalLM"])),
    "predicts, plain": lambda: found(store_the_last_layer_plain(planned(SMALL_V3, format="nvfp4"))),
    "predicts two": lambda: found(reconfigured(planned(SMALL_V3, format="fp8"), num_nextn_predict_layers=2)),
    "no layer that predicts": lambda: found(described(golden("models/deepseekv3-FP8-mcore"))),
    "dense among experts": lambda: found(planned(QWEN_MOE | {"mlp_only_layers": [1]}, format="bf16")),
    "few rows": lambda: found(planned(QWEN_MOE | {"num_key_value_heads": 2}, format="fp8_pb")),
    "old": lambda: found(planned(LLAMA, format="fp8_pb", options=MODELOPT), "tensorrt_llm", version="1.2.1"),
    "llama 4 on Hopper": lambda: found(planned(LLAMA4, format="nvfp4"), gpu="h200"),
    "on a T4": lambda: found(planned(LLAMA, format="fp8"), gpu="t4"),
    "keys and values in four bits, blocks": lambda: found(planned(QWEN_MOE, format="fp8_pb", kv_cache="nvfp4")),
    "DeepSeek's dialect, with cache": lambda: found(replace(planned(LLAMA, format="fp8_pb", kv_cache="fp8"), quant=None)),
    "factors of q": lambda: found(described(with_factors(golden("models/llama-NVFP4")))),
    "experts in channels": lambda: found(planned(QWEN_MOE, format="fp8_pc_pt")),
    "experts of no inputs": lambda: found(described(without_an_input(golden("models/qwen3moe-FP8")))),
    "experts, smoothed": lambda: found(planned(QWEN_MOE, format="w4a8_awq")),
    "experts of another backend": lambda: found(planned(QWEN_MOE, format="w4a8_nvfp4_fp8")),
    "groups of no size": lambda: found(alter(planned(LLAMA, format="int4_awq"), group_size=None)),
    "cache alone": lambda: found(replace(planned(LLAMA, format="nvfp4", kv_cache="nvfp4"), quant=None)),
    "mixed, a cache in four bits": lambda: found(planned(LLAMA, recipe="nvfp4_mlp_fp8_attention", kv_cache="nvfp4")),
    "mixed, in config.json alone": lambda: found(replace(planned(LLAMA, recipe="nvfp4_mlp_fp8_attention"), quant=None)),
    "weights in four bits alone, on Blackwell": lambda: found(planned(QWEN_MOE, format="w4a16_nvfp4"), gpu="b200"),
    "mxfp8, early": lambda: found(planned(QWEN_MOE, format="mxfp8"), version="0.5.17"),
    "a quantized head": lambda: found(planned(MIXTRAL, format="fp8", set=("lm_head=fp8",))),
    "kimi": lambda: found(planned(KIMI, format="fp8_pb")),
    "ministral 3": lambda: found(planned(MINISTRAL3, format="bf16")),
    "mistral 3": lambda: found(planned(MISTRAL3, format="fp8_pb")),
    "phi 3": lambda: found(planned(PHI3, format="w4a16_nvfp4")),
    "phi 3, in blocks": lambda: found(planned(PHI3, format="fp8_pb")),
    "minimax": lambda: found(without_routing(planned(MINIMAX, format="bf16"))),
    "glm 5": lambda: found(reconfigured(planned(GLM5, format="bf16"), index_topk_pattern="FFFF")),
    "unknown to all": lambda: found(alter(planned(LLAMA, format="fp8"), quant_algo="INT3")),
}  # fmt: skip


def test_every_rule_is_found_somewhere() -> None:
    seen: dict[str, set[str]] = {engine: set() for engine in ENGINES}
    checkpoints = [described(golden(name)) for name in GOLDEN] + [described(damaged(damage)) for damage in DAMAGES]
    everything = [found(checkpoint) for checkpoint in checkpoints] + [make() for make in OTHERS.values()]
    everything += [found(make(), **asked) for make, asked, *_ in HYBRIDS.values()]
    for judgement in everything:
        engines = ENGINES if len(judgement) == len(ENGINES) else ["tensorrt_llm"]
        for engine, broken in zip(engines, judgement, strict=True):
            seen[engine] |= set(broken)
    assert [(engine, rule) for engine, module in ENGINES.items() for rule in module.RULES.keys() - seen[engine]] == []


def test_rules_say_where_they_were_read() -> None:
    assert all(module.RELEASES[0] == module.VERSION for module in ENGINES.values())
    tables = [(name, module) for name, one in ENGINES.items() for module in (one, DRAFTS[name])]
    for name, module in tables:
        seen = any(rule.seen for rule in module.RULES.values())
        assert seen == bool(module.SEEN_IN) and (Path(__file__).parents[2] / module.SEEN_IN).exists()
        for rule in module.RULES.values():
            assert rule.source.endswith(".py") and rule.source.startswith(ENGINES[name].NAME)
    listed = sum(len(module.RULES) + 1 for _, module in tables) + len(ENGINES) * (len(ARCHITECTURES) + 1)
    assert len(rules()) == listed


QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ATTENTION, MLP, EXPERTS = "model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("listed", "parent", "parts", "joined", "expected"),
    # Whether vLLM (ModelOpt's dialect, and its own), SGLang (the same two) and TensorRT-LLM leave it out; None: they refuse.
    [
        (["lm_head"], "", ("lm_head",), "lm_head", (True,) * 5),
        ([], ATTENTION, ("o_proj",), "o_proj", (False,) * 5),
        ([f"{ATTENTION}.o_proj"], ATTENTION, ("o_proj",), "o_proj", (True, True, True, True, True)),
        ([f"{ATTENTION}.{part}" for part in QKV], ATTENTION, QKV, "qkv_proj", (True, True, True, True, True)),
        ([f"{ATTENTION}.q_proj"], ATTENTION, QKV, "qkv_proj", (None, None, None, None, True)),
        (["*.q_proj", "*.k_proj", "*.v_proj"], ATTENTION, QKV, "qkv_proj", (False, False, False, False, True)),
        ([f"{ATTENTION}*"], ATTENTION, QKV, "qkv_proj", (True, False, True, False, True)),
        (["model.layers.1*"], "model.layers.11.mlp", GATE_UP, "gate_up_proj", (True, False, True, False, True)),
        (["model.layers.1"], "model.layers.11.mlp", GATE_UP, "gate_up_proj", (True, False, False, False, False)),
        (["model.layers.1.*"], "model.layers.11.mlp", GATE_UP, "gate_up_proj", (False,) * 5),
        (["mlp.gate"], MLP, GATE_UP, "gate_up_proj", (True, False, False, False, False)),
        (["self_attn"], ATTENTION, ("o_proj",), "o_proj", (True, False, True, True, False)),
        (["o_proj"], ATTENTION, ("o_proj",), "o_proj", (True, False, True, True, False)),
        ([MLP], EXPERTS, (), "", (True, False, False, True, True)),
        ([EXPERTS], EXPERTS, (), "", (True, True, True, True, True)),
        ([f"{EXPERTS}.3.down_proj"], EXPERTS, (), "", (True, True, False, True, False)),
        (["kv_a_proj_with_mqa"], ATTENTION, ("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj_with_mqa",
         (True, False, None, None, False)),
    ],
)  # fmt: skip
def test_names_are_matched_as_each_engine_does(
    listed: list[str], parent: str, parts: tuple[str, ...], joined: str, expected: tuple[bool | None, ...]
) -> None:
    names = matching.Names(tuple(listed))

    def asked(*matchers) -> bool | None:
        try:
            return any(matcher(names, parent, parts, joined) for matcher in matchers)
        except matching.Partly:
            return None

    excluded, skipped = matching.sglang_excluded, matching.sglang_skipped
    sglang = (skipped, excluded) if parts else (excluded,)
    each = ((matching.vllm_modelopt,), (matching.vllm_exactly,), sglang, (skipped,), (matching.tensorrt_llm,))
    assert tuple(asked(*matchers) for matchers in each) == expected


def test_a_gpu_decides_what_it_computes() -> None:
    four = planned(LLAMA, format="nvfp4")
    verdict = {gpu: verdict_of(four, "tensorrt_llm", gpu=gpu) for gpu in ("h200", "b200")}
    assert verdict["h200"].text == "refused: it does not compute NVFP4 on h200 (it does on Blackwell)"
    assert verdict["b200"].text == "loads"
    assert [verdict_of(four, "vllm", gpu=gpu).loads for gpu in ("t4", "h200")] == [True, True]
    assert verdict_of(planned(LLAMA, format="fp8"), "sglang", gpu="a100").loads is False
    smoothed = planned(LLAMA, format="nvfp4_awq", options=Options(awq_output="modelopt"))
    assert [verdict_of(smoothed, "sglang", gpu=gpu).loads for gpu in ("h200", "b200")] == [False, True]


@pytest.mark.parametrize("config", [LLAMA4, LLAMA4_SEES], ids=["text", "sees"])
def test_where_vllm_multiplies_llama_4s_router_weights_twice(config: dict) -> None:
    """As it was seen to, in NVFP4 on an H200; and not in bf16, fp8_pb, and with the Triton kernel in fp8."""
    kinds = {form: planned(config, format=form) for form in ("bf16", "fp8", "fp8_pb", "nvfp4")}
    asked = (None, "l40s", "h200", "b200", "rtx5090")
    said = {form: [verdict_of(kind, "vllm", gpu=gpu) for gpu in asked] for form, kind in kinds.items()}
    nothing, minds, loses = (False, Effect.MINDS), (True, Effect.MINDS), (True, Effect.LOSES)
    assert {form: [("twice" in one.why, one.effect) for one in row] for form, row in said.items()} == {
        "bf16": [nothing] * 5,
        "fp8": [minds, nothing, minds, nothing, minds],
        "fp8_pb": [nothing] * 5,
        "nvfp4": [minds, loses, loses, nothing, minds],
    }
    assert "--moe-backend triton" in said["fp8"][2].why and "--moe-backend emulation" in said["nvfp4"][2].why


def test_the_worst_decides_and_many_modules_are_one_finding() -> None:
    verdict = verdict_of(described(golden("bad/llama-FP8-mcore-tp2pp1ep1")), "vllm")
    assert verdict.effect is Effect.REFUSES and verdict.loads is False
    assert "model.layers.0.mlp.down_proj and 1 more: its weight is [128, 128], and FP8 has [128, 256]" in verdict.why
    both = lines({"vLLM": verdict})
    assert both[0] == "vLLM 0.32.0: refused:" and all(line.startswith("    ") for line in both[1:])


@pytest.mark.parametrize(
    ("said", "flags", "status", "says"),
    [
        (golden(FP8), (), 0, "vLLM 0.32.0: loads\nSGLang 0.5.23: loads\nTensorRT-LLM 1.3: loads"),
        (golden("models/llama-INT4_AWQ"), (), 1, "vLLM 0.32.0: refused:\n    it does not know W4A16_AWQ"),
        (golden("models/llama-INT4_AWQ"), ("--engine", "tensorrt_llm"), 0, "TensorRT-LLM 1.3: loads"),
        (golden(NVFP4), ("--engine", "tensorrt_llm", "--gpu", "h200"), 1, "does not compute NVFP4 on h200"),
        (golden(NVFP4), ("--engine", "vllm", "--version", "0.31"), 0, "vLLM 0.31: loads:\n    these are the rules of 0.32.0"),
        (golden(NVFP4), ("--engine", "vllm", "--version", "0.32"), 0, "vLLM 0.32: loads"),
        (golden("models/llama-FP8-mcore"), (), 0, "TensorRT-LLM 1.3: loads"),
        (golden(FP8), ("--tp", 2), 0, "vLLM 0.32.0: loads"),
        (golden(FP8), ("--tp", 3), 1, "at a tensor-parallel size of 3 it cannot deal out 4 heads"),
    ],
)  # fmt: skip
def test_check_of_a_folder(said: Said, flags: tuple, status: int, says: str, tmp_path: Path) -> None:
    found = command_line("check", written(said, tmp_path / "checkpoint"), *flags)
    assert found[0] == status
    assert says in found[1]


def test_check_prints_json(tmp_path: Path) -> None:
    status, said = command_line("check", written(golden(NVFP4), tmp_path / "checkpoint"), "--json")
    found = json.loads(said)
    assert status == 0
    assert found["TensorRT-LLM"]["verdict"] == "loads"
    finding = {"rule": "machine", "effect": "loads", "why": "on Blackwell", "way": "", "names": []}
    assert found["TensorRT-LLM"]["findings"] == [finding]
    assert found["vLLM"] == {"version": "0.32.0", "loads": True, "verdict": "loads", "findings": []}


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ((), 2, "the following arguments are required: COMMAND"),
        (("--help",), 0, "check     which engines load a checkpoint"),
        (("chek",), 2, "invalid choice: 'chek'"),
        (("check",), 2, ""),
        (("check", "x", "--rules"), 2, ""),
        (("check", "x", "--version", "1"), 2, ""),
        (("check", "x", "--engine", "tgi"), 2, ""),
        (("check", "x", "--tp", "0"), 2, "0 is no number of GPUs"),
        (("check", "/nowhere"), 1, "error: /nowhere is not a folder"),
        (("plan", "--target", "tgi"), 2, ""),
        (("plan", "--format", "fp8_pb", "--target", "vllm:8"), 1, "at a tensor-parallel size of 8 a GPU has 64 of its 512 rows"),
        (("plan", "--format", "int4_awq", "--target", "vllm,tensorrt_llm"), 1, "error: --target: vLLM will not load this"),
        (("plan", "--format", "nvfp4", "--target", "vllm,sglang,tensorrt_llm"), 0, "vLLM              loads"),
        (("check", "--rules"), 0, "every expert is there; it does not look"),
        (("check", "--rules"), 0, "SGLang 0.5.23, seen in tests/engines/test_sglang.py\n  files"),
        (("check", "--rules"), 0, "TensorRT-LLM main of 2026, parts of its files seen in tests/engines/test_tensorrt_llm.py\n"),
    ],
)  # fmt: skip
def test_exit_statuses_of_commands(arguments: tuple, status: int, says: str, capsys: pytest.CaptureFixture) -> None:
    found, printed = command_line(*arguments), capsys.readouterr()
    assert found[0] == status
    assert says in found[1] + printed.out + printed.err


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(of_folder, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "it is no JSON object" in refusal(of_folder, tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": "many"}')
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "not a readable safetensors file" in refusal(of_folder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no .safetensors file. Give the folder that has the weights" in refusal(of_folder, tmp_path)


def test_target_names_engines_and_refusals_are_errors() -> None:
    said = refusal(refusals, plan_of(LLAMA, format="bf16"), "vllm,tgi")
    assert "--target: unknown engine 'tgi'. Known: vllm, sglang, tensorrt_llm" in said
    plan = plan_of(LLAMA, format="int4_awq")
    assert refusals(plan, "tensorrt_llm") == []
    assert refusals(plan, "vllm,sglang") == [
        "--target: vLLM will not load this: it does not know W4A16_AWQ (choose --format fp8, fp8_pb or nvfp4)",
        "--target: SGLang will not load this: it does not know W4A16_AWQ (choose --format fp8, fp8_pb or nvfp4)",
    ]


JUNK = (None, 0, -1, 1.5, "", "x" * 50, [], [[1]], [None], {}, {"a": {}}, True, ["*" * 30 + "a"], {"quant_algo": 5})


def places(inside: object) -> Iterator[tuple[dict | list, Any]]:
    """Every place in a JSON value where another value could stand."""
    found = inside.items() if isinstance(inside, dict) else enumerate(inside) if isinstance(inside, list) else ()
    for key, value in found:
        yield inside, key
        yield from places(value)


def test_no_config_and_no_header_however_odd_breaks_the_rules() -> None:
    dice = random.Random(3)
    for _ in range(400):
        said = golden(dice.choice(list(HEADERS)))
        for _ in range(dice.choice((1, 2))):
            at, key = dice.choice(list(places(dice.choice([one for one in (said["config"], said["quant"]) if one]))))
            at[key] = copy.deepcopy(dice.choice(JUNK))
        tensors = next(iter(said["files"].values()))
        shape = dice.choice(([], [0], [1], [3, 5], [2, 2, 2], [0, 128], [128, 128, 1, 1]))
        tensors[dice.choice(list(tensors))] = [dice.choice(("F32", "U8", "F8_E4M3", "BOOL")), shape]
        tensors[dice.choice(("weight", ".", "k_scale", "x.experts.y.weight", "experts.weight"))] = ["F32", [4, 4]]
        checkpoint = described(said)
        asked = {"gpu": dice.choice((None, "h200", "t4")), "tp": dice.choice((1, 3, 8, 10**9))}
        assert all(verdict.text for verdict in verdicts(checkpoint, **asked).values())


def test_where_it_was_seen_is_said_of_rules_and_architectures_that_there_are() -> None:
    for engine, module in ENGINES.items():
        marked = {name for name in module.RULES if runs.seen_of(engine, name, False) == runs.GPU}
        assert marked == set(runs._RULES.get(engine, ()))
        assert runs._MODELS.get(engine, {}).keys() <= ARCHITECTURES.keys()
        assert len(runs.coverage(engine)) == len(ARCHITECTURES)
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    assert page.split("<!-- seen -->\n")[1].split("\n<!-- /seen -->")[0].splitlines() == runs.table()
    assert "seen on a GPU  " in "\n".join(rules())


def test_what_is_said_not_to_be_written_is_refused_and_nothing_else() -> None:
    sparse = GLM5 | {"architectures": ["DeepseekV32ForCausalLM"]}
    known = (
        LLAMA,
        MISTRAL,
        PHI3,
        QWEN,
        QWEN_MOE,
        MIXTRAL,
        MINIMAX,
        LLAMA4,
        LLAMA4_SEES,
        GPT_OSS,
        SMALL_V3,
        sparse,
        GLM5,
        KIMI,
    )
    said, refused = set(), set()
    for config in known:
        architecture = config["architectures"][0]
        for form, asked in (("fp8_pb", {"format": "fp8_pb"}), ("KV scales", {"format": "fp8", "kv_cache": "fp8"})):
            if runs.seen_in("vllm", architecture, form) == runs.UNWRITTEN:
                said.add((architecture, form))
            try:
                plan_of(config, **asked)
            except ExportError:
                refused.add((architecture, form))
    assert said == refused == runs._REFUSED


def test_windows_are_a_matter_of_the_class_and_of_the_positions() -> None:
    windows = {"sliding_window": 32, "max_position_embeddings": 64}
    layers = QWEN["num_hidden_layers"]
    for config, changes, broken in (
        (MISTRAL, {}, ["window"]),
        (MISTRAL, {"sliding_window": MISTRAL["max_position_embeddings"]}, []),
        (MISTRAL, {"use_sliding_window": False}, []),
        (MISTRAL, {"sliding_window": None}, []),
        (LLAMA, windows, []),
        (QWEN, windows, []),
        (QWEN, windows | {"use_sliding_window": True}, []),  # max_window_layers is 28
        (QWEN, windows | {"use_sliding_window": True, "max_window_layers": layers}, []),
        (QWEN, windows | {"use_sliding_window": True, "max_window_layers": layers - 1}, ["window"]),
        (QWEN_MOE, windows, []),
        (QWEN_MOE, windows | {"use_sliding_window": True, "max_window_layers": layers}, ["window"]),
    ):
        assert found(reconfigured(planned(config, format="fp8"), **changes), "sglang") == [broken]
