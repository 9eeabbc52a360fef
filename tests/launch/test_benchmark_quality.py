"""`launch/benchmark.py quality` as its user sees it: one process without torchrun, a table, a reason when it refuses."""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.functional import kl_div, nll_loss

from megatron_export.formats import FORMATS

from ..support.command_line import python
from ..support.models import EXAMPLE, read_json, tensors
from . import test_benchmark_speed

pytestmark = pytest.mark.whole

Run = Callable[..., tuple[int, str, str]]
SCRIPT = Path(__file__).parents[2] / "launch" / "benchmark.py"
QUICK = ("quality", "--device", "cpu", "--windows", "2")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The exports of three formats, and what was printed; on one thread, so that tests beside it are not held up."""
    folder = tmp_path_factory.mktemp("quality") / "exports"
    recipes = ("--recipes", "nvfp4_mlp_only")
    flags = [
        *QUICK,
        "--formats",
        "bf16",
        "int4_awq",
        "nvfp4_awq",
        *recipes,
        "--calib-samples",
        "4",
        "--calib-seq-len",
        "128",
    ]
    done = python(SCRIPT, *flags, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, so that its imports are not waited for again; one thread, as in `output`."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark", module)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def quality(benchmark: ModuleType) -> ModuleType:
    """The subcommand's own module."""
    return sys.modules["bench.quality"]


@pytest.fixture
def run(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> Run:
    """Runs a subcommand in this process: its exit status, and what it says on either stream."""

    def started(*flags: object) -> tuple[int, str, str]:
        status = benchmark.main(list(map(str, flags)))
        return status, *capsys.readouterr()

    return started


def rows_of(said: str) -> dict[str, dict[str, str]]:
    """The table's rows by their first cell, each by column."""
    return {next(iter(row.values())): row for row in test_benchmark_speed.rows_of(said)}


def test_the_table_has_a_finite_row_for_every_format_and_for_what_the_search_is_worth(output: tuple[Path, str]) -> None:
    rows = rows_of(output[1])
    smoothed = ("nvfp4_awq", "nvfp4_awq, four_over_six", "nvfp4_awq, modelopt")
    assert list(rows) == ["bf16", "int4_awq", "int4 without search", *smoothed, "nvfp4_mlp_only"]
    assert float(rows["nvfp4_mlp_only"]["bits per weight"]) == pytest.approx(4.5 * 2 / 3 + 16 / 3, abs=1e-3)  # its MLPs
    for label, row in rows.items():
        numbers = [float(row[name].replace(",", "")) for name in list(row)[1:5] + ["mean KL", "worst KL"]]
        assert all(map(math.isfinite, numbers)), row
        assert 4 < float(row["perplexity"]) < 10
        assert (float(row["ratio"]) == 1) == (label == "bf16")
        assert (float(row["mean KL"]) == 0) == (label == "bf16")
        assert float(row["worst KL"]) >= float(row["mean KL"])
    reference = rows.pop("bf16")
    assert reference["bits per weight"] == "16.000"
    assert (reference["change, nats per token"], reference["worst layer"]) == ("", "")
    for row in rows.values():
        change, error = (float(number) for number in row["change, nats per token"].split(" ± "))
        assert math.isclose(math.exp(change), float(row["ratio"]), abs_tol=1e-4)
        assert math.isclose(float(row["perplexity"]) / float(reference["perplexity"]), math.exp(change), rel_tol=1e-4)
        assert 0 < error < 0.2
        decibels, _, layer = row["worst layer"].partition(" dB in ")
        assert 5 < float(decibels) < 40
        assert 0 <= int(layer) < 4


def test_losses_and_divergences_are_those_of_torch(quality: ModuleType) -> None:
    """The divergence is of the first model's distribution from the other's: sum of p * (log p - log q)."""
    score = quality.Score("other", EXAMPLE)
    mine, theirs = torch.randn(2, 3, 7, 11).to(torch.bfloat16)
    ids = torch.randint(0, 11, (3, 7))
    quality.compare_tokens(score, mine, theirs, ids)
    log_q, log_p = (logits[:, :-1].double().log_softmax(-1) for logits in (mine, theirs))
    losses = nll_loss(log_q.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(torch.stack(score.losses), losses, atol=1e-6, rtol=0)
    divergences = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(torch.cat(score.divergences).double(), divergences.flatten(), atol=1e-6, rtol=0)


def test_layers_are_compared_on_what_the_reference_gave_each_of_them(quality: ModuleType) -> None:
    """Signals are 1 and 3 beside an input of 5; noises 0.1 and 0.03 beside them: 20 dB and 40 dB."""
    score = quality.Score("other", EXAMPLE)
    inputs = torch.full((2, 4), 5.0)
    calls = [quality.Call((inputs,), {"add": add}, inputs + add) for add in (1.0, 3.0)]
    wrong = [lambda inputs, add, by=by: inputs + add + by for by in (0.1, 0.03)]
    model = SimpleNamespace(base_model=SimpleNamespace(layers=wrong))
    for _ in range(2):
        quality.compare_layers(score, model, calls)
    assert [round(20 * math.log10(ratio), 2) for ratio in (score.signal / score.noise).sqrt().tolist()] == [20, 40]
    assert quality.worst_layer(score) == "20.0 dB in 0"


def test_the_search_changes_the_weights_and_only_its_absence_leaves_vectors_of_one(output: tuple[Path, str]) -> None:
    searched, unsearched = (tensors(output[0] / name) for name in ("int4_awq", "int4_without_search"))
    assert sorted(searched) == sorted(unsearched)
    vectors = [name for name in searched if name.endswith("pre_quant_scale")]
    assert len(vectors) == 8  # o_proj and down_proj of four layers
    assert all((unsearched[name] == 1).all() for name in vectors)
    assert any((searched[name] != 1).any() for name in vectors)
    for name, said in {
        "nvfp4_awq": "NVFP4",
        "nvfp4_awq_modelopt": "NVFP4_AWQ",
        "int4_without_search": "W4A16_AWQ",
    }.items():
        assert read_json(output[0] / name / "hf_quant_config.json")["quantization"]["quant_algo"] == said


def test_given_checkpoints_are_scored_against_the_first_with_the_same_numbers(output: tuple, run: Run) -> None:
    folder, said = output
    status, shown, _ = run(*QUICK, folder / "bf16", folder / "int4_awq")
    assert status == 0
    exported, given = rows_of(said), rows_of(shown)
    assert list(given) == [str(folder / "bf16"), str(folder / "int4_awq")]
    for name in ("bf16", "int4_awq"):
        assert given[str(folder / name)] | {"format": name} == exported[name]


def test_the_table_is_written_between_the_marks_of_its_page(
    output: tuple, run: Run, quality: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "quality.md"
    monkeypatch.setattr(quality, "PAGE", page)
    page.write_text("no marks")
    flags = (*QUICK, output[0] / "bf16", output[0] / "int4_awq", "--write-readme")
    status, _, said = run(*flags)
    assert (status, "Put the marks where the table is to be" in said) == (1, True)
    page.write_text("before\n\n<!-- quality -->\nold\n<!-- /quality -->\nafter\n")
    status, said, _ = run(*flags)
    assert status == 0
    shown = "\n".join(line for line in said.splitlines() if "|" in line)
    assert ElementTree.parse(page.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert "int4_awq</text>" in page.with_suffix(".svg").read_text()
    assert page.read_text() == f"before\n\n<!-- quality -->\n{shown}\n<!-- /quality -->\nafter\n"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("no/such/folder",), "no tokenizer that loads"),
        ((EXAMPLE, "--text", "no/such/file"), "no text file no/such/file"),
        ((EXAMPLE, "--windows", 1), "1 windows of 512 tokens; a standard error needs two"),
        (("--output", EXAMPLE.parent, "--formats", "bf16", "--calib-samples", 10**6), "too short for --calib-samples"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_a_reason(flags: tuple, reason: str, run: Run) -> None:
    status, _, said = run(*QUICK, *flags)
    assert status == 1
    assert said.lstrip().startswith("error: ")
    assert reason in said


def test_a_folder_that_holds_exports_already_is_refused_before_anything_is_run(output: tuple, run: Run) -> None:
    status, _, said = run(*QUICK, "--output", output[0])
    assert status == 1
    assert f"{output[0] / 'bf16'}, " in said
    assert "exists already. Give another --output" in said


def test_encode_times_every_format_against_a_copy(run: Run, tmp_path: Path) -> None:
    flags = ("--shape", 128, 256, "--repeats", 3, "--device", "cpu", "--json", tmp_path / "found.json")
    status, said, _ = run("encode", *flags)
    assert status == 0
    found = read_json(tmp_path / "found.json")
    names = [row["format"] for row in found["rows"]]
    assert names == [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("|")][2:]
    assert names[:1] + names[-4:] == [
        "copy",
        *(f"{name}{groups}" for name in ("int4_awq", "w4a8_awq") for groups in ("", ", groups of 64")),
    ]
    searched = ("nvfp4, mse", "nvfp4, four_over_six")
    assert [name for name in names[1:-4] if name not in searched] == [*FORMATS][1:-2]
    assert {*searched} < {*names}
    size = 128 * 256
    copy, fp8, nvfp4, int4 = (found["rows"][names.index(name)] for name in ("copy", "fp8", "nvfp4", "int4_awq"))
    assert [row["bytes"] for row in (copy, fp8, nvfp4)] == [4 * size, 3 * size + 8, size * 5 // 2 + size // 16 + 8]
    assert int4["bytes"] == size * 5 // 2 + size // 32
    assert all(row["of_copy"] == pytest.approx(row["gb_per_s"] / copy["gb_per_s"]) for row in found["rows"])


def test_encode_refuses_a_shape_that_a_format_cannot_hold(run: Run) -> None:
    status, _, said = run("encode", "--formats", "nvfp4", "--shape", 130, 200, "--device", "cpu", "--repeats", 1)
    assert (status, "--shape 130 200: nvfp4 needs multiples of 1 and 16" in said) == (1, True)
