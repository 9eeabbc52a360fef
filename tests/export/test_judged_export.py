"""An export that judges itself: what is not good enough is not published; report and card; upload."""

import hashlib
import json
from pathlib import Path
from unittest import mock

import pytest

from ..support.command_line import command_line
from ..support.models import read_json, tensors
from ..support.ranks import Ranks, command
from .test_topologies import calibration_flags, export

pytestmark = pytest.mark.whole


def flags(source: Path, output: Path, *others: object) -> tuple:
    return ("--hf-model", source, "--output", output, *calibration_flags(source), *others)


def test_a_folded_export_is_judged_and_described(ranks: Ranks, models: dict[str, Path], output: Path) -> None:
    """At TP = 2, smoothed, with grouped queries, in several files."""
    shape = ("--tp", 2, "--format", "nvfp4_awq", "--kv-cache", "fp8", "--max-shard-size", "100KB", "--report")
    said = export(ranks, 2, *flags(models["llama31"], output, *shape))
    assert said.splitlines()[-1] == "sound             nothing wrong was found"
    names = {path.name for path in output.iterdir()}
    listed = read_json(output / "export_manifest.json")["files"].keys()
    assert names - listed == {"report.html", "README.md", "export_manifest.json"}
    digest = hashlib.sha256((output / "export_manifest.json").read_bytes()).hexdigest()
    page, card = ((output / name).read_text() for name in ("report.html", "README.md"))
    assert digest in page
    assert digest in card
    assert "<h2>AWQ</h2>" in page
    assert "<h2>Time</h2>" in page
    assert str(output.parent) not in page + card
    run = read_json(output / "export_manifest.json")["run"]
    assert {"load", "calibrate"} <= run["seconds"].keys()
    assert len(run["alphas"]) == 4 * 5  # qkv, o alone and shared, fc1, fc2


def test_experts_and_their_tokens_are_in_the_report(ranks: Ranks, models: dict[str, Path], output: Path) -> None:
    shape = ("--ep", 2, "--format", "nvfp4_awq", "--report")
    export(ranks, 2, *flags(models["qwen3_moe"], output, *shape))
    page = (output / "report.html").read_text()
    assert "<h2>Tokens per expert</h2>" in page
    tokens = read_json(output / "export_manifest.json")["run"]["tokens"]
    assert [len(counts) for counts in tokens.values()] == [4, 4, 4]


def test_what_a_budget_chose_by_is_in_the_report(ranks: Ranks, models: dict[str, Path], output: Path) -> None:
    export(ranks, 1, *flags(models["llama31"], output, "--effective-bits", 6, "--report"))
    page, costs = (
        (output / "report.html").read_text(),
        read_json(output / "export_manifest.json")["run"]["sensitivities"],
    )
    assert "<h2>What each format costs where</h2>" in page
    assert len(costs) == 4 * 4 * 2  # layers, groups, nvfp4 and fp8
    for format in ("nvfp4", "fp8"):
        cost = costs[f"decoder.layers.2.mlp.linear_fc1.sensitivity.{format}"]
        assert f"layer 2, gate, up in {format}: {cost:.3g} nats per token" in page


def test_what_is_not_good_enough_is_not_published_and_can_be_resumed(
    ranks: Ranks, models: dict[str, Path], output: Path
) -> None:
    shape = ("--tp", 2, "--format", "nvfp4")
    wanted = ("--device", "cpu", "--verify", "--min-snr", 99)
    found = ranks.call(2, command, *flags(models["llama31"], output, *shape, *wanted))
    assert [status for status, _ in found] == [1, 1]
    assert "not published: model.layers.0.self_attn.q_proj.weight: " in found[0][1]
    assert "dB, below 99" in found[0][1]
    assert not output.exists()
    said = export(ranks, 2, *flags(models["llama31"], output, *shape, "--verify", "--resume"))
    assert "resumed           1 of 1 files were complete already" in said


GROUPS = ("--group-size", 64, "--exclude", "*.down_proj")
KINDS = {
    "llama4_vision": ("fp8",),  # stacked experts, and what sees
    "llama4": ("nvfp4",),
    "gpt_oss": ("nvfp4", "--nvfp4-scales", "four_over_six"),  # stacked, woven, with biases
    "deepseek_v3": ("nvfp4_awq", "--quantize-mla"),
    "mixtral": ("w4a8_awq", "--group-size", 64, "--exclude", "*.experts*"),
    "llama32": ("nvfp4", "--kv-cache", "nvfp4", "--nvfp4-scales", "mse"),  # tied
    "qwen2": ("int4_awq", *GROUPS),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_architecture_is_judged_sound(name: str, ranks: Ranks, models: dict[str, Path], output: Path) -> None:
    said = export(ranks, 1, *flags(models[name], output, "--verify", "--format", *KINDS[name]))
    assert "sound             nothing wrong was found" in said


def pushed(*words: object) -> tuple[int, str, list]:
    """The command in a rank, with a hub that only notes what it is asked."""
    with mock.patch("huggingface_hub.HfApi") as api:
        api().upload_folder.return_value.commit_url = "https://hub/org/name"
        status, said = command(*words)
        return status, said, [str(call) for call in api().upload_folder.call_args_list]


def test_rank_0_uploads_what_was_published(ranks: Ranks, models: dict[str, Path], output: Path) -> None:
    given = ("--device", "cpu", "--hf-model", models["llama31"], "--output", output, "--tp", 2, "--format", "bf16")
    (status, said, uploads), (_, _, others) = ranks.call(2, pushed, *given, "--push-to-hub", "org/name")
    assert status == 0, said
    assert said.splitlines()[-1] == "pushed            https://hub/org/name"
    assert len(uploads) == 1
    assert str(output) in uploads[0]
    assert others == []


def test_a_published_checkpoint_that_was_touched_is_found_by_its_manifest(
    ranks: Ranks, models: dict[str, Path], output: Path
) -> None:
    export(ranks, 1, *flags(models["llama31"], output, "--format", "fp8"))
    (output.parent / "llama31").symlink_to(models["llama31"])
    status, told = command_line("verify", output, "--json")
    assert status == 0  # its manifest names its original, which is beside it
    assert len(tensors(output)) == len(json.loads(told)["weights"]) + 2 * 28
    (output / "generation_config.json").write_text("{}")
    status, told = command_line("verify", output, "--json")
    assert status == 1
    assert json.loads(told)["problems"] == ["generation_config.json is not the file that export_manifest.json lists"]
