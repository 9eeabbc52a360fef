"""`plan` as its user sees it: the table and JSON of a config.json alone, without ranks, in seconds."""

import json
import re
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_export.cli import commands
from megatron_export.cli.config import configured
from megatron_export.cli.plan_command import Preview, as_json, previewed, rows
from megatron_export.common.text import readable

from ..support.command_line import python
from ..support.configs import DEEPSEEK_V3, LLAMA, LLAMA4, SMALL_V3
from ..support.models import EXAMPLE


def shown(folder: Path, config: dict, **settings: object) -> Preview:
    """What the command shows of a folder that has a config.json alone, on the fewest ranks."""
    (folder / "config.json").write_text(json.dumps(config))
    return previewed(configured(hf_model=str(folder), dry_run=True, **settings), EXAMPLE, None)


@pytest.mark.whole
def test_a_671b_model_is_planned_in_four_seconds_and_300_megabytes(tmp_path: Path) -> None:
    """On 256 ranks, each expert cut in 8, from the start of Python. In seconds of a processor, as others may be using it too, and
    of one that adds fifteen million numbers in a second; a slower one has as much longer.
    """
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    script = """
import sys, time
from megatron_export.__main__ import script
assert script() == 0
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
        done = python("-c", script, *flags)
        assert done.returncode == 0, done.stderr
        seconds, kilobytes, slower = map(float, done.stderr.split())
        if seconds < 4 * slower:
            break
    assert seconds < 4 * slower
    assert kilobytes < 300_000
    said = json.loads(done.stdout)
    assert said["topology"]["world"] == len(said["peak_gpu_memory"]) == len(said["wire"]["to_writers"]) == 256
    assert said["quantized"]["model.layers.*.mlp.experts.*.down_proj"] == 59 * 256
    published = 2 * 671_026_404_352 + 4 * 58 * 256  # and routers' biases, in float32
    assert 2 * 13.4e9 < said["bytes_in_bfloat16"] - published < 2 * 13.5e9  # the layer that predicts one more token
    assert 0 < sum(said["files"].values()) - said["bytes"] < 200 * said["tensors"]


@pytest.mark.whole
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
    done = python("-c", script, "plan", "--hf-model", tmp_path, "--tp", 4, "--pp", 3, "--world", 24)
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
def test_exit_statuses_are_0_1_and_2(flags: tuple, status: int, says: str, capsys: pytest.CaptureFixture) -> None:
    try:
        found = commands.main(print, list(map(str, flags)))
    except SystemExit as exit:
        found = exit.code
    said = capsys.readouterr()
    assert found == status
    assert re.search(says, said.out + said.err, re.DOTALL)
    assert bool(said.err) == bool(status)


@pytest.mark.whole
def test_the_module_is_the_command() -> None:
    done = python("-m", "megatron_export", "plan", "--tp", "2", "--json")
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
