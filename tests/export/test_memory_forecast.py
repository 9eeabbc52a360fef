"""What an export will take, told from config.json alone: where parameters live, bytes, memory, engines, and how it is shown."""

import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_export.cli import commands
from megatron_export.cli.config import configured
from megatron_export.cli.plan_command import Preview, as_json, previewed, rows
from megatron_export.common.errors import ExportError
from megatron_export.common.text import readable
from megatron_export.export.memory_forecast import Forecast, forecast
from megatron_export.formats import Options
from megatron_export.planning.engine_check import of_plan, verdicts
from megatron_export.planning.plan import assumed
from megatron_export.planning.rank_placement import grid_of

from ..support.models import EXAMPLE
from ..support.plans import plan_for

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-5,
}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN_MOE = MIXTRAL | {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 256, "norm_topk_prob": True}
LLAMA4 = MIXTRAL | {"architectures": ["Llama4ForCausalLM"], "num_experts_per_tok": 1, "intermediate_size_mlp": 512}
LLAMA4_SEES = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": LLAMA4}
QWEN = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "rms_norm_eps": 1e-6,
}
SMALL_V3 = DEEPSEEK_V3 | {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "vocab_size": 1000,
}
LAST = "decoder.layers.5.mlp.linear_fc2.weight"


def told(config: dict, tp: int = 1, etp: int | None = None, form: str = "bf16", **sizes: int) -> Forecast:
    """The forecast for GPUs."""
    held = assumed(config, tp, etp, **sizes)
    return forecast(plan_for(config, held, format=form), held, grid_of(config, tp, etp, **sizes), "cuda")


def shown(folder: Path, config: dict, **settings: object) -> Preview:
    """What the command shows of a folder that has a config.json alone, on the fewest ranks."""
    (folder / "config.json").write_text(json.dumps(config))
    return previewed(configured(hf_model=str(folder), dry_run=True, **settings), EXAMPLE, None)


def process(*arguments: object) -> subprocess.CompletedProcess:
    """A Python of its own, on one thread."""
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(
    ("config", "sizes", "parameter", "ranks"),
    [
        (LLAMA, {"tp": 2}, LAST, (0, 1)),
        (LLAMA, {"tp": 2, "world": 8}, LAST, (0, 1)),
        (LLAMA, {"tp": 2, "pp": 2}, LAST, (2, 3)),
        (LLAMA, {"tp": 2, "pp": 2, "world": 8}, LAST, (4, 5)),  # tp fastest, then dp, then pp
        (LLAMA, {"pp": 4}, "decoder.layers.2.mlp.linear_fc2.weight", (1,)),  # of 1, 2, 1 and 2 layers
        (LLAMA, {"pp": 2, "vpp": 3}, "decoder.layers.2.mlp.linear_fc2.weight", (0,)),  # stages of a layer, in turn
        (LLAMA, {"pp": 3, "pp_layout": "E|t*5|tL"}, "decoder.layers.0.mlp.linear_fc2.weight", (1,)),
        (LLAMA, {"pp": 3}, "embedding.word_embeddings.weight", (0,)),
        (LLAMA, {"pp": 3}, "decoder.final_layernorm.weight", (2,)),
        (LLAMA, {"tp": 2, "pp": 3}, "output_layer.weight", (4, 5)),
        (MIXTRAL, {"ep": 4}, "decoder.layers.0.mlp.experts.7.linear_fc1.weight", (3,)),
        (MIXTRAL, {"tp": 2, "ep": 2}, "decoder.layers.0.mlp.experts.7.linear_fc1.weight", (2, 3)),
        (MIXTRAL, {"tp": 4, "etp": 1, "ep": 4}, "decoder.layers.0.mlp.experts.7.linear_fc1.weight", (3,)),
        (MIXTRAL, {"pp": 2, "ep": 2, "world": 8}, "decoder.layers.5.mlp.experts.7.linear_fc1.weight", (5,)),
        (SMALL_V3, {"pp": 2}, "decoder.layers.4.eh_proj.weight", (1,)),  # predicts one more token
        (SMALL_V3, {"pp": 2, "pp_layout": "Etttt|mL"}, "decoder.final_layernorm.weight", (0,)),
    ],
)
def test_parameters_live_where_megatron_puts_them(config: dict, sizes: dict, parameter: str, ranks: tuple) -> None:
    assert assumed(config, **{"tp": 1, **sizes})[parameter].ranks == ranks


def test_the_smallest_world_is_that_which_holds_all() -> None:
    assert grid_of(LLAMA, 2, pp=3).world == 6
    assert grid_of(MIXTRAL, 2, 1, pp=2, ep=8).world == 16
    assert grid_of(MIXTRAL, 2, pp=2, ep=2, world=24).world == 24


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (
            LLAMA,
            {"tp": 2, "pp": 2, "world": 6},
            "world size 6 is no multiple of --tp 2 x --pp 2 = 4 .*Give 4, or a multiple",
        ),
        (LLAMA, {"tp": 3}, "num_attention_heads 8 does not divide by --tp 3"),
        (LLAMA, {"tp": 1, "ep": 2}, "no experts"),
        (LLAMA, {"tp": 1, "pp": 7}, "7 stages for num_hidden_layers 6"),
        (LLAMA, {"tp": 1, "pp": 2, "pp_layout": "Ettt|tttx"}, "has 'x', no letter of Megatron's"),
        (LLAMA, {"tp": 1, "pp": 2, "pp_layout": "Ettt|ttL"}, "this model is EttttttL"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(config: dict, sizes: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        grid_of(config, **sizes)


def test_what_is_sent_is_what_rank_0_does_not_hold() -> None:
    """In bfloat16, where bytes are those of the weights; no vocabulary is padded, no norm is too short to align."""
    config = LLAMA | {"vocab_size": 1024}
    assert told(config).sent == (0,)
    halves = told(config, 2)
    cut = halves.nbytes - 13 * 256 * 2  # all but the norms, which rank 0 has whole
    assert halves.sent == (0, cut // 2)
    stages = told(config, 2, pp=2)
    assert stages.sent[2] == stages.sent[3] + 7 * 256 * 2
    assert stages.sent[1] == (cut // 2) - stages.sent[3]


def test_replicas_hold_weights_and_send_nothing() -> None:
    found = told(LLAMA, 2, pp=2, world=8)
    assert [sent > 0 for sent in found.sent] == [False, True, False, False, True, True, False, False]
    assert found.gpu[3] == found.gpu[2]
    assert found.gpu[2] > 0


def test_a_weight_whose_tiles_are_cut_travels_to_its_first_rank() -> None:
    found = told(LLAMA, 8, form="fp8_pb")  # each rank has 64 rows of gate and up, a half of a block
    assert found.gathered[0] == 0
    assert min(found.gathered[1:]) == max(found.gathered) > 0
    assert told(LLAMA, 4, form="nvfp4").gathered == (0,) * 4


def test_memory_of_a_rank_is_its_weights_and_copies_of_a_bucket() -> None:
    """Of the only bucket in bfloat16: the message of each item, the parcel of all; and q, k, v, which are copied apart."""
    found = told(LLAMA)
    padding, qkv = 2 * 24 * 256 * 2, 6 * (16 * 32) * 256 * 2
    assert found.gpu == (found.nbytes + padding + qkv + 2 * found.nbytes,)


def test_a_larger_model_takes_more_for_its_weights_alone() -> None:
    wide = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000}
    few, many = (told(wide | {"num_hidden_layers": layers}) for layers in (12, 48))
    assert many.nbytes - few.nbytes > 3_000_000_000
    assert abs((many.gpu[0] - few.gpu[0]) - (many.nbytes - few.nbytes)) < 100 << 20


def test_a_671b_model_is_planned_in_ten_seconds_and_a_gigabyte(tmp_path: Path) -> None:
    """On 256 ranks, each expert cut in 8. In seconds of a processor, as others may be using it too, and of one that adds
    fifteen million numbers in a second; a slower one has as much longer.
    """
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    script = """
import sys, time
from megatron_export.cli.commands import main
assert main(print, sys.argv[1:]) == 0
with open("/proc/self/status") as status:
    peak = next(line for line in status if line.startswith("VmHWM")).split()[1]
planned = time.process_time()
total = 0
for number in range(6_000_000):
    total += number
print(planned, peak, max(1, (time.process_time() - planned) / 0.4), file=sys.stderr)
"""
    flags = ("plan", "--hf-model", tmp_path, "--tp", 8, "--pp", 4, "--ep", 8, "--format", "nvfp4", "--json")
    for _ in range(2):  # a second time if the machine was slow for a while
        done = process("-c", script, *flags)
        assert done.returncode == 0, done.stderr
        seconds, kilobytes, slower = map(float, done.stderr.split())
        if seconds < 10 * slower:
            break
    assert seconds < 10 * slower
    assert kilobytes < 1_000_000
    said = json.loads(done.stdout)
    assert said["topology"]["world"] == len(said["peak_gpu_memory"]) == len(said["wire"]["to_writers"]) == 256
    assert said["quantized"]["model.layers.*.mlp.experts.*.down_proj"] == 59 * 256
    published = 2 * 671_026_404_352 + 4 * 58 * 256  # and routers' biases, in float32
    assert 2 * 13.4e9 < said["bytes_in_bfloat16"] - published < 2 * 13.5e9  # the layer that predicts one more token
    assert 0 < sum(said["files"].values()) - said["bytes"] < 200 * said["tensors"]


def test_a_plan_needs_no_ranks_no_megatron_and_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    script = """
import sys
from megatron_export.cli.commands import main
assert main(lambda *said, **kinds: None, sys.argv[1:]) == 0
import torch
assert not torch.distributed.is_initialized()
print(sorted({"megatron.core", "transformers"} & set(sys.modules)))
"""
    done = process("-c", script, "plan", "--hf-model", tmp_path, "--tp", 4, "--pp", 3, "--world", 24)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (("plan", "--tp", 2), 0, "peak GPU memory"),
        (("plan", "--tp", 3), 1, "error: .*does not divide by --tp 3"),
        (("plan", "--hf-model", "/nowhere"), 1, "error: no model folder /nowhere"),
        (("plan", "--world", 0), 2, "--world must be at least 1"),
        (("plan", "--group-size", 64), 1, "--group-size has no effect with --format fp8"),
        (("plan", "--calib-data", "x"), 2, "unrecognized arguments: --calib-data"),
        (("plan", "--vpp", 2), 2, "--vpp 2 needs --pp"),
        ((), 2, "COMMAND"),
    ],
)
def test_exit_statuses_are_0_1_refused_and_2_bad_usage(
    flags: tuple, status: int, says: str, capsys: pytest.CaptureFixture
) -> None:
    try:
        found = commands.main(print, list(map(str, flags)))
    except SystemExit as exit:
        found = exit.code
    said = capsys.readouterr()
    assert found == status
    assert re.search(says, said.out + said.err, re.DOTALL)
    assert bool(said.err) == bool(status)


def test_the_module_is_the_command() -> None:
    done = process("-m", "megatron_export", "plan", "--tp", "2", "--json")
    assert json.loads(done.stdout)["topology"]["world"] == 2


def test_the_table_and_json_say_the_same(tmp_path: Path) -> None:
    found = shown(tmp_path, SMALL_V3, tp=2, etp=1, ep=2, pp=2, format="nvfp4", max_shard_size="300KB")
    table, said = dict(rows(found)), as_json(found)
    assert table["tensors"] == f"{said['tensors']:,}"
    assert table["written"] == f"{said['bytes']:,} bytes in {len(said['files'])} files"
    assert table["on disk"].startswith(f"{sum(said['files'].values()):,} bytes, headers too; ")
    assert table["over the wire"] == f"{sum(said['wire']['to_writers']):,} bytes to rank 0 from 3 ranks"
    assert table["ranks"] == "4 = tp 2 x pp 2 x dp 1; experts etp 1 x ep 2 x pp 2 x dp 1"
    assert table["peak GPU memory"].endswith(f"{readable(said['peak_gpu_memory'][0])} on rank 0, which writes")
    assert table["peak host memory"].endswith(f"{readable(said['peak_host_memory'][0])} on rank 0, which writes")
    assert said["topology"]["stages"] == ["Ett", "ttmL"]
    assert [table[engine].partition(":")[0] for engine in said["engines"]] == ["loads"] * 3
    assert [remark for label, remark in rows(found) if label == "note"] == said["remarks"]
    assert json.loads(json.dumps(said)) == said


def test_what_is_left_alone_is_told_with_the_reason(tmp_path: Path) -> None:
    reasons = shown(tmp_path, SMALL_V3, format="nvfp4", exclude=("model.layers.3.*",)).left
    assert list(reasons) == ["by --exclude", "not loaded by every engine", "never quantized"]
    assert "model.layers.3.self_attn.o_proj" in reasons["by --exclude"]
    assert "model.layers.3.mlp.experts.7.down_proj" in reasons["by --exclude"]
    assert "model.layers.2.self_attn.o_proj" in reasons["not loaded by every engine"]
    never = {"lm_head", "model.embed_tokens", "model.layers.3.mlp.gate", "model.layers.4.eh_proj"}
    assert never < set(reasons["never quantized"])
    assert not any("experts" in name for name in reasons["never quantized"])
    keys = shown(tmp_path, LLAMA4, format="nvfp4").left["not loaded by every engine"]
    assert len(keys) == 3 * 6 and "model.layers.0.self_attn.k_proj" in keys
    assert shown(tmp_path, LLAMA, format="bf16").left == {}


def test_a_disk_that_is_too_small_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: namedtuple("Usage", "free")(64 << 20))
    found = shown(tmp_path, LLAMA, format="bf16", output=tmp_path / "not" / "there")
    assert found.disk == tmp_path
    assert found.needed == (64 << 20) + sum(found.forecast.files.values())
    assert dict(rows(found))["on disk"].endswith(f"{readable(found.needed - (64 << 20))} too little")


def test_what_is_copied_is_not_counted_where_it_is_not_there(tmp_path: Path) -> None:
    config = {"text_config": LLAMA4, "architectures": ["Llama4ForConditionalGeneration"]}
    [remark] = [note for note in shown(tmp_path, config, format="bf16").remarks if "not counted" in note]
    assert remark.startswith("vision_model, multi_modal_projector: copied from the original, and not counted here")


def test_mtp_can_be_dropped(tmp_path: Path) -> None:
    with_it, without = (shown(tmp_path, SMALL_V3, format="bf16", mtp=mtp).plan for mtp in ("keep", "drop"))
    assert any("model.layers.4." in output.name for file in with_it.files.values() for output in file)
    assert not any("model.layers.4." in output.name for file in without.files.values() for output in file)


YES, NO, UNKNOWN = True, False, None


@pytest.mark.parametrize(
    ("config", "settings", "loads"),  # by vLLM, SGLang, TensorRT-LLM
    [
        (LLAMA, {"format": "bf16"}, (YES, YES, YES)),
        (LLAMA, {"format": "fp8", "kv_cache": "fp8"}, (YES, YES, YES)),
        (QWEN, {"format": "fp8_pb"}, (YES, YES, YES)),
        (LLAMA, {"format": "fp8_pb"}, (YES, NO, YES)),  # SGLang's Llama loses weight_scale_inv
        (QWEN | {"num_key_value_heads": 2}, {"format": "fp8_pb"}, (NO, NO, YES)),  # k and v have 64 rows
        (LLAMA, {"format": "fp8_pb", "options": Options(fp8_pb_spelling="modelopt")}, (YES, NO, YES)),
        (LLAMA, {"format": "nvfp4"}, (YES, YES, YES)),
        (LLAMA, {"format": "nvfp4_awq"}, (YES, YES, YES)),
        (LLAMA, {"format": "nvfp4_awq", "options": Options(awq_output="modelopt")}, (NO, NO, YES)),
        (LLAMA, {"format": "int4_awq"}, (NO, NO, YES)),
        (LLAMA, {"format": "w4a8_awq"}, (NO, NO, YES)),
        (MIXTRAL, {"format": "fp8", "kv_cache": "fp8"}, (YES, YES, YES)),
        (QWEN_MOE, {"format": "nvfp4", "kv_cache": "fp8"}, (YES, YES, YES)),
        (SMALL_V3, {"format": "nvfp4"}, (YES, YES, YES)),
        (SMALL_V3, {"format": "fp8", "quantize_mla": True}, (YES, YES, NO)),
        (SMALL_V3, {"format": "nvfp4", "quantize_mla": True}, (YES, NO, NO)),
        (LLAMA4_SEES, {"format": "fp8"}, (YES, YES, YES)),
        (LLAMA4_SEES, {"format": "nvfp4"}, (YES, NO, YES)),
        (LLAMA4_SEES, {"format": "fp8_pb"}, (YES, YES, NO)),
        (LLAMA4, {"format": "fp8"}, (YES, NO, NO)),  # experts one by one in a model that does not see
        (LLAMA4, {"format": "fp8_pb"}, (YES, NO, NO)),
        (LLAMA4, {"format": "int4_awq"}, (NO, NO, NO)),
    ],
)
def test_engines(config: dict, settings: dict, loads: tuple) -> None:
    plan = plan_for(config, assumed(config, 1), **settings)
    found = verdicts(of_plan(plan))
    assert tuple(verdict.loads for verdict in found.values()) == loads
    assert all(verdict.why for verdict in found.values() if not verdict.loads)


def test_what_to_mind_is_told_with_the_engine() -> None:
    plan = plan_for(LLAMA, assumed(LLAMA, 1), format="nvfp4", kv_cache="nvfp4")
    assert {engine: verdict.text for engine, verdict in verdicts(of_plan(plan)).items()} == {
        "vLLM": "loads: its NVFP4 KV cache with FlashInfer only",
        "SGLang": "loads: with --kv-cache-dtype nvfp4 on Blackwell",
        "TensorRT-LLM": "loads: on Blackwell",
    }
    plan = plan_for(QWEN_MOE, assumed(QWEN_MOE, 1), format="fp8_pb", kv_cache="fp8")
    assert verdicts(of_plan(plan))["SGLang"].text == (
        "loads but: ignores the scales of this architecture's KV cache; its FP8 KV cache with --kv-cache-dtype fp8_e4m3"
    )
