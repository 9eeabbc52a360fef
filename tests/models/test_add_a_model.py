"""The page that adds an architecture: what it shows is made, exported on one rank and on two, read back and judged."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from megatron_export.common.errors import ExportError
from megatron_export.models import ARCHITECTURES, Architecture, parameters_of
from megatron_export.planning.engine_check import of_folder, verdicts
from megatron_export.planning.plan import assumed
from megatron_export.verify.thresholds import Wanted, inspected

from ..support.models import LENGTH, SAMPLES, assert_same, contents, read_json, tensors
from ..support.pages import block, blocks, read, without
from ..support.plans import plan_for
from ..support.ranks import Ranks, command

pytestmark = pytest.mark.whole

PAGE = read("add-a-model.md")
TOY = "ToyForCausalLM"
FORMATS = {"bf16": (), "fp8": ("--kv-cache", "fp8"), "nvfp4_awq": ()}
QWEN2 = (  # a Qwen 2 computes the same under other names
    ("model.embed_tokens.", "model.tok_embeddings."),
    ("model.norm.", "model.final_norm."),
    ("lm_head.", "output."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.k_proj.k_scale", "attention.k_proj.k_scale"),
    ("self_attn.v_proj.v_scale", "attention.v_proj.v_scale"),
    *((f"self_attn.{part}_proj.", f"attention.w{part}.") for part in "qkvo"),
    ("mlp.gate_proj.", "feed_forward.w1."),
    ("mlp.up_proj.", "feed_forward.w3."),
    ("mlp.down_proj.", "feed_forward.w2."),
)


@contextmanager
def added() -> Iterator[None]:
    """While open, this process has the file and the line of the page."""
    toy = ModuleType("megatron_export.models.toy")
    toy.__package__ = "megatron_export.models"
    exec(block(PAGE, "1. The file", "python"), vars(toy))
    lines = [line.removeprefix("+") for line in block(PAGE, "2. The line", "diff").splitlines()]
    with mock.patch.dict(ARCHITECTURES, eval("{" + "\n".join(lines) + "}", {"toy": toy})):
        yield


def made(folder: Path) -> Path:
    """The golden's checkpoint, with random numbers; ids to calibrate with are beside it."""
    source = folder / "toy"
    source.mkdir()
    generator = torch.Generator().manual_seed(3)
    held = {}
    for line in block(PAGE, "3. The golden", "text").splitlines():
        name, _, *shape = line.split()
        size = [int(size) for size in shape]
        matrix = len(size) == 2
        numbers = (torch.randn if matrix else torch.rand)(size, generator=generator)
        held[name] = (numbers * 0.08 if matrix else numbers + 0.5).bfloat16()
    save_file(held, source / "model.safetensors")
    (source / "config.json").write_text(block(PAGE, "3. The golden", "json"))
    save_file({"input_ids": torch.randint(0, 500, (SAMPLES, LENGTH), generator=generator)}, folder / "ids.safetensors")
    return source


def as_qwen2(source: Path) -> Path:
    """The same model under the names of a Qwen 2."""
    folder = source.parent / "qwen2"
    folder.mkdir()
    held = {spelled(name, back=True): tensor for name, tensor in tensors(source).items()}
    save_file(held, folder / "model.safetensors")
    config = read_json(source / "config.json")
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": config["norm_eps"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spelled(name: str, back: bool = False) -> str:
    """What the toy calls a tensor of a Qwen 2; or the other way."""
    pairs = [pair[::-1] if back else pair for pair in QWEN2]
    found = [name.replace(*pair) for pair in pairs if pair[0] in name]
    assert found, name
    return found[0]


def exported(ranks: Ranks, source: Path, out: Path, tp: int, measured: Path | None = None) -> str:
    """What the command says while `tp` ranks export every format into `out`, with the statistics of `measured`, or their own."""
    ids = ("--calib-data", source.parent / "ids.safetensors", "--calib-samples", SAMPLES, "--calib-seq-len", LENGTH)
    flags, all_said = ("--device", "cpu", "--hf-model", source, "--tp", tp), []
    out.mkdir()
    for form, more in FORMATS.items():
        kept = (*ids, "--save-calibration", out / f"{form}.safetensors")
        kept = kept if measured is None else ("--load-calibration", measured / f"{form}.safetensors")
        to = ("--output", out / form, "--format", form, *more, *(kept if form != "bf16" else ()))
        for status, said in ranks.call(tp, started, *flags, *to):
            assert status == 0, said
            all_said.append(said)
    return "\n".join(all_said)


def started(*flags: object) -> tuple[int, str]:
    """In a rank: the command, where the architecture was added."""
    with added():
        return command(*flags)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def table() -> Iterator[None]:
    with added():
        yield


def test_one_rank_and_two_export_the_same_sound_bytes(toy: Path, ranks: Ranks, table: None, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    said = exported(ranks, toy, one, 1) + exported(ranks, toy, two, 2, measured=one)
    assert len(re.findall(rf"not known: no rules about the architecture {TOY}", said)) == 2 * 3 * len(FORMATS)
    for form in FORMATS:
        assert contents(one / form) == contents(two / form)
        found = inspected(two / form, toy, Wanted())
        assert (found.problems, found.judged.plan.format) == ([], form)
        assert {verdict.loads for verdict in verdicts(of_folder(two / form)).values()} == {None}
    assert_same(tensors(two / "bf16"), tensors(toy))


def test_it_has_the_numbers_of_an_architecture_that_computes_the_same(toy: Path, ranks: Ranks, tmp_path: Path) -> None:
    for source in (toy, as_qwen2(toy)):
        exported(ranks, source, tmp_path / source.name, 2)
    for form in FORMATS:
        theirs = tensors(tmp_path / "qwen2" / form)
        assert_same(tensors(tmp_path / "toy" / form), {spelled(name): tensor for name, tensor in theirs.items()})
        left = read_json(tmp_path / "qwen2" / form / "config.json").get("quantization_config", {}).get("ignore", [])
        ours = read_json(tmp_path / "toy" / form / "config.json").get("quantization_config", {}).get("ignore", [])
        assert sorted(spelled(f"{name}.").strip(".") for name in left) == ours


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_names_its_own_output_layer_to_the_engines(tied: bool, toy: Path, table: None) -> None:
    config = read_json(toy / "config.json") | {"tie_word_embeddings": tied}
    plan = plan_for(config, assumed(config, 2), format="fp8")
    assert plan.excluded == ("model.tok_embeddings", "output")
    assert ("output.weight" in {output.name for outputs in plan.files.values() for output in outputs}) is not tied


def test_biases_are_there_where_its_config_says_so(toy: Path, table: None) -> None:
    config = read_json(toy / "config.json")
    biases = [name for name in parameters_of(config) if name.endswith(".bias")]
    assert biases == ["decoder.layers.0.self_attention.linear_qkv.bias"]
    assert not [name for name in parameters_of(config | {"qkv_bias": False}) if name.endswith(".bias")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": None}, "lacks norm_eps"),
        ({"norm_eps": -1}, "norm_eps is -1, not a number above 0"),
        ({"hidden_act": "gelu"}, f"{TOY} with hidden_act = 'gelu' is not supported; only 'silu' is"),
    ],
)
def test_a_wrong_config_is_told_in_its_own_words(changes: dict, message: str, toy: Path, table: None) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        parameters_of(read_json(toy / "config.json") | changes)


def test_without_its_line_in_the_table_it_is_not_known(toy: Path) -> None:
    with pytest.raises(ExportError, match=f"unknown architecture '{TOY}'"):
        parameters_of(read_json(toy / "config.json"))


def test_the_scripts_of_the_page_print_the_names_of_both_sides(toy: Path, table: None) -> None:
    first, second = blocks(PAGE.split("## 1.")[0], "python")
    assert printed(first, folder=toy) == block(PAGE, "3. The golden", "text")
    said = printed(second, config=read_json(toy / "config.json"))
    qkv = r"decoder\.layers\.0\.self_attention\.linear_qkv\.weight 128 64 -> \S+wq\S+ \S+wk\S+ \S+wv\S+"
    assert re.search(rf"^{qkv}$", said, re.MULTILINE)
    names = {name for line in said.splitlines() for name in line.partition(" -> ")[2].split()}
    assert names == {line.split()[0] for line in block(PAGE, "3. The golden", "text").splitlines()}


def printed(script: str, **names: object) -> str:
    said = StringIO()
    with redirect_stdout(said):
        exec(script, names)
    return said.getvalue()


def test_every_field_of_an_architecture_is_explained_on_the_page_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == [field.name for field in fields(Architecture)]


@pytest.mark.parametrize("step", ["1. The file", "2. The line", "3. The golden"])
def test_a_page_without_a_step_adds_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PAGE", without(PAGE, step))
    with pytest.raises(AssertionError, match=step), added():
        made(tmp_path)
