"""`verify` and `diff` as their users see them: exit statuses, thresholds, JSON; and what is uploaded."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file

from megatron_export.cli import hub
from megatron_export.verify import thresholds
from megatron_export.verify.report import html, model_card
from megatron_export.verify.report.facts import account_of

from ..support.command_line import command_line, python
from ..support.exported import exported
from ..support.live import refusal
from ..support.models import EXAMPLE, GOLDEN, read_json, tensors

pytestmark = pytest.mark.whole

REFERENCE = GOLDEN / "models" / "llama-bf16"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model without the calibration ids beside it."""
    folder, ids = tmp_path_factory.mktemp("reference") / "llama", shutil.ignore_patterns("calib_input_ids.safetensors")
    return Path(shutil.copytree(REFERENCE, folder, ignore=ids))


@pytest.fixture(scope="module")
def checkpoint(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "nvfp4"
    exported(reference, folder, "nvfp4")
    return folder


def test_a_sound_checkpoint_ends_with_0_and_says_so(reference: Path, checkpoint: Path) -> None:
    status, said = command_line("verify", checkpoint, "--reference", reference)
    assert status == 0
    rows = [line.partition("  ")[0] for line in said.splitlines()]
    assert rows[-6:] == ["reference", "format", "compared", "signal to noise", "cosine", "sound"]
    assert "compared          14 quantized weights, 7 others, 7 equal" in said


@pytest.mark.parametrize(
    "name",
    ["FP8-KVFP8", "FP8_PB_WO", "NVFP4", "NVFP4_AWQ", "NVFP4-KVNVFP4", "W4A16_NVFP4", "MXFP8", "INT4_AWQ", "W4A8_AWQ"],
)
def test_what_modelopt_wrote_is_sound(name: str, reference: Path) -> None:
    status, said = command_line("verify", GOLDEN / "models" / f"llama-{name}", "--reference", reference)
    assert status == 0, said


def test_thresholds_end_with_1(reference: Path, checkpoint: Path) -> None:
    status, said = command_line("verify", checkpoint, "--reference", reference, "--min-snr", 30)
    assert status == 1
    assert said.count(" dB, below 30") == 14
    status, said = command_line("verify", checkpoint, "--reference", reference, "--max-ppl-ratio", 2)
    assert status == 2  # needs a text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("verify", "{folder}"), "does not say what it was made from. Give --reference"),
        (("verify", "{folder}", "--reference", "{folder}/nothing"), "no model folder"),
        (("verify", "{folder}", "--reference", "{folder}"), "is quantized already"),
        (("diff", "{folder}", "{folder}/nothing"), "nothing is not a folder"),
    ],
)
def test_what_cannot_be_judged_ends_with_2(flags: tuple[str, ...], message: str, checkpoint: Path) -> None:
    status, said = command_line(*(flag.format(folder=checkpoint) for flag in flags))
    assert status == 2
    assert message in said


@pytest.mark.parametrize("flags", [(), ("verfy",), ("verify",), ("diff", "one"), ("verify", "x", "--colour")])
def test_bad_usage_ends_with_2(flags: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    assert command_line(*flags) == (2, "")
    assert "usage: python -m megatron_export" in capsys.readouterr().err


def test_json_has_every_weight(reference: Path, checkpoint: Path) -> None:
    status, said = command_line("verify", checkpoint, "--reference", reference, "--json")
    found = json.loads(said)
    assert (status, found["sound"], found["format"], found["problems"]) == (0, True, "nvfp4", [])
    assert found["weights"].keys() == tensors(reference).keys()
    one = found["weights"]["model.layers.0.mlp.up_proj.weight"]
    assert 19 < one["snr_db"] < 22
    assert 12 < one["worst_block_db"] < one["snr_db"]
    assert 0.99 < one["cosine"] < 1
    assert (one["other_codes"], one["wrong_blocks"], one["blocks"]) == (0, 0, 256 * 8)
    assert found["weights"]["model.norm.weight"]["snr_db"] is None  # equal


def test_signal_to_noise_cosine_and_worst_block_are_those_of_a_slow_account(reference: Path, checkpoint: Path) -> None:
    from megatron_export.common.piece import Piece
    from megatron_export.formats import nvfp4

    name = "model.layers.1.self_attn.o_proj"
    found, original = tensors(checkpoint), tensors(reference)[f"{name}.weight"].double()
    pieces = {s: Piece(found[f"{name}.{s}"], ()) for s in ("weight", "weight_scale", "weight_scale_2")}
    mine = nvfp4.decode(pieces).double()
    told = json.loads(command_line("verify", checkpoint, "--reference", reference, "--json")[1])
    said = told["weights"][f"{name}.weight"]
    noise = (mine - original).square()
    assert said["snr_db"] == pytest.approx(float(10 * (original.square().sum() / noise.sum()).log10()), abs=0.002)
    assert said["cosine"] == pytest.approx(float((mine * original).sum() / mine.norm() / original.norm()), abs=1e-6)
    blocks = original.square().unflatten(1, (-1, 16)).sum(2) / noise.unflatten(1, (-1, 16)).sum(2)
    assert said["worst_block_db"] == pytest.approx(float(10 * blocks.min().log10()), abs=0.01)
    row, column = divmod(int(blocks.argmin()), blocks.shape[1])
    assert said["worst_block_at"] == [row, column * 16]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The example model in four bits, on two windows."""
    folder = tmp_path_factory.mktemp("scored")
    exported(EXAMPLE, folder / "nvfp4", "nvfp4")
    words = ("--text", EXAMPLE / "heldout.txt", "--windows", 2, "--device", "cpu", "--json")
    status, said = command_line("verify", folder / "nvfp4", "--reference", EXAMPLE, *words, "--max-ppl-ratio", 1.0001)
    return {"status": status, **json.loads(said)}


def test_a_text_gives_perplexity_and_divergence_and_their_threshold_fails(scored: dict) -> None:
    score = scored["score"]
    assert scored["status"] == 1
    assert len(scored["problems"]) == 1
    assert re.fullmatch(r"perplexity is 1\.\d+ times the reference's, above 1.0001", scored["problems"][0])
    assert score["windows"] == 2
    assert 1.0001 < score["ratio"] == pytest.approx(score["perplexity"] / score["reference"], rel=1e-5)
    assert 0 < score["divergence"] < score["worst"]


def test_a_text_is_refused_where_no_tokenizer_reads_it(reference: Path, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x = 1\n")
    status, said = command_line("verify", checkpoint, "--reference", reference, "--text", text)
    assert status == 2
    assert "has no tokenizer" in said


def test_a_checkpoint_does_not_differ_from_its_copy(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    status, said = command_line("diff", checkpoint, tmp_path)
    assert status == 0
    assert said.splitlines()[-1] == "same              nothing differs"


def test_diff_tells_how_far_decoded_values_are_apart_across_formats(reference: Path, checkpoint: Path) -> None:
    status, said = command_line("diff", reference, checkpoint, "--json")
    found = json.loads(said)
    assert status == 1
    assert found["only_in_a"] == []
    assert len(found["only_in_b"]) == 14 * 3
    assert len(found["kinds"]) == 14
    assert "model.layers.0.mlp.up_proj.weight: BF16 [256, 128], U8 [256, 64]" in found["kinds"]
    assert any(line.startswith("config.json: quantization_config is None, ") for line in found["configs"])
    assert found["weights"].keys() == tensors(reference).keys()
    assert 19 < found["weights"]["model.layers.0.mlp.up_proj.weight"]["snr"] < 22
    assert found["weights"]["model.norm.weight"] == {"snr": None, "largest": 0.0, "same": True}


def test_diff_names_one_scale_and_one_setting(checkpoint: Path, tmp_path: Path) -> None:
    found = tensors(checkpoint)
    name = "model.layers.0.mlp.up_proj"
    found[f"{name}.weight_scale_2"] *= 2
    found[f"{name}.input_scale"] *= 2
    save_file(found, tmp_path / "model.safetensors")
    config = read_json(checkpoint / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (tmp_path / "hf_quant_config.json").write_bytes((checkpoint / "hf_quant_config.json").read_bytes())
    status, said = command_line("diff", checkpoint, tmp_path)
    assert status == 1
    assert "weights           21 compared, 1 differ" in said
    assert re.search(rf"{name}.weight +0.0 dB ", said)
    assert f"config            config.json: rms_norm_eps is {config['rms_norm_eps']}, 0.5" in said


@pytest.mark.parametrize("format", ["fp8", "fp8_pb", "int4_awq", "w4a8_awq", "nvfp4_awq"])
def test_diff_decodes_every_format(format: str, reference: Path, tmp_path: Path) -> None:
    exported(reference, tmp_path / format, format)
    found = json.loads(command_line("diff", reference, tmp_path / format, "--json")[1])["weights"]
    assert len(found) == 21
    if not format.endswith("awq"):  # whose weights are smoothed
        assert all(one["snr"] is None or one["snr"] > 30 for one in found.values())
    assert 5 < found["model.layers.0.self_attn.v_proj.weight"]["snr"] < 40 or format.endswith("awq")


class Hub:
    """What `HfApi` is asked."""

    calls: list[tuple[str, dict]] = []

    def whoami(self) -> dict:
        return {"name": "org"}

    def create_repo(self, name: str, **settings: Any) -> None:
        self.calls.append((name, settings))
        if name == "nobody/may":
            raise PermissionError("403")

    def upload_folder(self, **settings: Any) -> SimpleNamespace:
        self.calls.append(("upload", settings))
        return SimpleNamespace(commit_url="https://hub/org/name/commit/1")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls.clear()
    return Hub.calls


def test_a_sound_checkpoint_is_uploaded_whole_and_private(uploads: list, reference: Path, checkpoint: Path) -> None:
    status, said = command_line("verify", checkpoint, "--reference", reference, "--push-to-hub", "org/name")
    assert (status, said.splitlines()[-1]) == (0, "pushed            https://hub/org/name/commit/1")
    assert uploads[0] == ("org/name", {"private": True, "exist_ok": True})
    assert (uploads[1][1]["repo_id"], uploads[1][1]["folder_path"]) == ("org/name", checkpoint)


def test_what_is_not_good_enough_is_not_uploaded(uploads: list, reference: Path, checkpoint: Path) -> None:
    flags = ("--reference", reference, "--min-snr", 30, "--push-to-hub", "org/name")
    assert command_line("verify", checkpoint, *flags)[0] == 1
    assert uploads == []


def test_an_upload_that_fails_says_how_to_try_again(uploads: list, checkpoint: Path) -> None:
    said = refusal(hub.push, checkpoint, "nobody/may")
    assert "was not uploaded to nobody/may (PermissionError: 403). Try again with python" in said


def test_a_report_stands_alone_and_escapes_what_it_shows(reference: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "<b>odd & name"))
    assert command_line("verify", folder, "--reference", reference, "--report")[0] == 0
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|<img|src=|@import|url\(", page)
    assert "<b>odd" not in page
    assert "<h1>&lt;b&gt;odd &amp; name</h1>" in page
    for part in ("How near every weight is", "The worst weights", "Scales", "Where it runs", "What is in the folder"):
        assert f"<h2>{part}</h2>" in page
    assert page.count("<tr><th>0</th>") == page.count("<tr><th>1</th>") == 1


def test_a_report_escapes_whatever_a_file_says(reference: Path, checkpoint: Path) -> None:
    odd = "<em>&"
    made = {"seconds": {odd: 1.0}, "topology": {odd: odd}, "calibration": {odd: odd}, "versions": {odd: odd}}
    made |= {"tokens": {"layers.0.router": [1]}}
    run = account_of(thresholds.inspected(checkpoint, reference, thresholds.Wanted()), odd, odd)
    found = replace(run.found, problems=[odd], unscored=odd)
    run = replace(run, manifest={"run": made}, found=found, worst=[[odd, odd]], engines={odd: odd})
    page = html.page(replace(run, plan=replace(run.plan, remarks=(odd,))))
    assert "<em>" not in page
    shown = 2 + 1 + 1  # the name twice, the origin, a problem
    shown += 2 + 1 + 2  # an engine and its verdict, why there is no score, a weight
    shown += 2 + 6 + 1  # a time twice, three pairs, a remark
    assert page.count("&lt;em&gt;&amp;") == shown


def test_a_card_has_front_matter_that_the_hub_reads(reference: Path, checkpoint: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    original = Path(shutil.copytree(reference, tmp_path / "original"))
    (original / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    folder = Path(shutil.copytree(checkpoint, tmp_path / "nvfp4"))
    assert command_line("verify", folder, "--reference", original, "--report")[0] == 0
    card = ModelCard.load(folder / "README.md").data
    assert card.license == "apache-2.0"
    assert card.pipeline_tag == "text-generation"
    assert card.base_model is None  # a folder is no model of the hub
    assert {"quantized", "nvfp4", "4-bit"} <= set(card.tags)
    text = (folder / "README.md").read_text()
    assert "vllm serve nvfp4\n" in text
    assert "20." in text.split("## Quality")[1].split("## Serving")[0]


def test_a_hub_id_is_the_cards_base_model(reference: Path, checkpoint: Path) -> None:
    found = thresholds.inspected(checkpoint, reference, thresholds.Wanted())
    assert "base_model: org/name\nbase_model_relation: quantized\n" in model_card.text(account_of(found, "org/name"))


def test_a_card_of_somebody_else_is_not_replaced(reference: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "README.md").write_text("# Mine\n")
    flags = ("verify", tmp_path, "--reference", reference, "--report")
    status, said = command_line(*flags)
    assert status == 2
    assert f"{tmp_path / 'README.md'} is there already, and not from here" in said
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    (tmp_path / "README.md").unlink()
    assert [command_line(*flags)[0], command_line(*flags)[0]] == [0, 0]


EXPORT = ("-m", "megatron_export", "export", "--device", "cpu")


def test_an_export_without_torchrun_is_one_process(tmp_path: Path) -> None:
    done = python(*EXPORT, "--format", "fp8_pb", "--output", tmp_path / "out")
    assert (done.returncode, (tmp_path / "out" / "model.safetensors").is_file()) == (0, True), done.stderr
    assert "resumed" not in done.stdout  # nothing was there


def test_an_export_that_needs_more_ranks_says_how_to_start_them(tmp_path: Path) -> None:
    done = python(*EXPORT, "--tp", 2, "--ep", 4, "--etp", 1, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: these sizes need 4 ranks, and torchrun did not start this process. Start it so, with the same flags: "
        "torchrun --nproc-per-node 4 -m megatron_export export"
    )
