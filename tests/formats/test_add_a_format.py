"""The page that adds a format: what it shows is done in a copy of the package, which exports, reads back and judges the format."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megatron_export.formats import Form

from ..support.command_line import said_by
from ..support.models import LENGTH, SAMPLES, contents, make_model, read_json, same, tensors
from ..support.pages import block, follow, read, using, without
from ..support.ranks import Ranks, living

pytestmark = pytest.mark.whole

PAGE = read("add-a-format.md")
FILE, LINE, GOLDEN, QUANTIZERS = "1. The file", "2. The line", "3. The golden", "4. ModelOpt's quantizers"
LINEAR = "model.layers.0.mlp.down_proj"  # of 96 inputs, which two ranks cut within a block


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return follow(PAGE, tmp_path_factory.mktemp("package"))


@pytest.fixture
def toy4(package: Path) -> Iterator[None]:
    """This process has the package of the page."""
    with using(package):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama31", num_hidden_layers=1)


@pytest.fixture(scope="module")
def exports(package: Path, model: Path, pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Tensor-parallel size -> the export; what was said is beside it."""
    folder, ranks = tmp_path_factory.mktemp("exports"), living(pool)
    ids = ("--calib-data", model.parent / "ids" / "calibration.safetensors", "--calib-samples", SAMPLES)
    measured = (*ids, "--calib-seq-len", LENGTH, "--save-calibration", folder / "measured.safetensors")
    loaded = ("--load-calibration", folder / "measured.safetensors")
    for tp, calibration in ((1, measured), (2, loaded)):
        flags = ("--device", "cpu", "--hf-model", model, "--tp", tp, "--format", "toy4", *calibration)
        found = ranks.call(tp, started, package, *flags, "--output", folder / f"tp{tp}")
        assert [status for status, _ in found] == [0] * tp, found
        (folder / f"tp{tp}.txt").write_text(found[0][1])
    return {tp: folder / f"tp{tp}" for tp in (1, 2)}


def started(package: Path, *flags: object) -> tuple[int, str]:
    """In a rank: the command of the page's package."""
    with using(package):
        return command("export", *flags)


def command(*words: object) -> tuple[int, str]:
    """Status and output of a subcommand."""
    from megatron_export.cli.commands import main

    return said_by(main, *words)


def planned(model: Path) -> dict:
    """What `plan` says of an export in it."""
    status, said = command("plan", "--hf-model", model, "--format", "toy4", "--tp", 2, "--json")
    assert status == 0, said
    return json.loads(said)


def golden_of(page: str) -> tuple[dict, dict]:
    """The golden's pieces as the page has them, and as the format makes them; both by suffix."""
    from megatron_export.common.piece import Amax
    from megatron_export.formats import chosen, encode

    golden = json.loads(block(page, GOLDEN, "json"))
    weight = torch.tensor(golden["in"]["weight"]).bfloat16()
    amax = Amax(weight.abs().amax().float(), torch.tensor(float(golden["in"]["input_amax"])))
    made = {suffix: piece.data for suffix, piece in encode(chosen("toy4"), weight, amax).items()}
    return {suffix: torch.tensor(said, dtype=made[suffix].dtype) for suffix, said in golden["out"].items()}, made


def recipe() -> str:
    """The format that a linear has, of which ModelOpt's quantizers do what `toy4` does."""
    from megatron_export.calibration.modelopt.quantizers import inherited_in, kinds_of

    linear = "decoder.layers.0.mlp.linear_fc2"
    weights = {"_num_bits": 4, "_axis": (0,), "_block_sizes": {-1: 32, "type": "static"}}
    quantizers = {f"{linear}.weight_quantizer": weights, f"{linear}.input_quantizer": {"_num_bits": (4, 3)}}
    return inherited_in(kinds_of(quantizers)).format


def test_the_plan_has_it(toy4: None, model: Path) -> None:
    assert planned(model)["format"] == "toy4"


def test_it_writes_its_golden_and_reads_it_back(toy4: None) -> None:
    from megatron_export.common.piece import Piece
    from megatron_export.formats import chosen

    golden, made = golden_of(PAGE)
    assert [suffix for suffix in made if not same(made[suffix], golden[suffix])] == []
    assert made.keys() == golden.keys()
    weight = torch.tensor(json.loads(block(PAGE, GOLDEN, "json"))["in"]["weight"])
    again = chosen("toy4").decode({suffix: Piece(data, ()) for suffix, data in golden.items()})
    assert torch.equal(again, (weight / golden["weight_scale"]).round() * golden["weight_scale"])


@pytest.mark.parametrize("cut", [0, 1])
def test_a_shard_encodes_to_the_shard_of_the_whole(cut: int, toy4: None) -> None:
    from megatron_export.common.piece import Amax, Axis, join
    from megatron_export.formats import chosen, encode

    form, weight = chosen("toy4"), torch.randn(64, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    amax = Amax(weight.abs().amax().float(), torch.tensor(3.0))
    whole, shards = encode(form, weight, amax), [encode(form, shard, amax) for shard in weight.chunk(4, cut)]
    for suffix, piece in whole.items():
        assert same(join([shard[suffix] for shard in shards], list(Axis)[cut]).data, piece.data), suffix


def test_it_is_exported_with_the_same_bytes_on_one_rank_and_on_two(exports: dict[int, Path]) -> None:
    assert contents(exports[1]) == contents(exports[2])
    written = tensors(exports[2])
    assert written[f"{LINEAR}.weight"].shape == (64, 96 // 2)
    assert written[f"{LINEAR}.weight_scale"].shape == (64, 96 // 32)
    assert written[f"{LINEAR}.input_scale"].shape == ()


def test_both_configs_name_it(exports: dict[int, Path]) -> None:
    inner = read_json(exports[2] / "config.json")["quantization_config"]
    outer = read_json(exports[2] / "hf_quant_config.json")["quantization"]
    for said in (inner, outer):
        assert (said["quant_algo"], said["group_size"]) == ("TOY4", 32)


def test_what_was_written_decodes_to_the_weights(exports: dict[int, Path], model: Path, toy4: None) -> None:
    from megatron_export.common.piece import Piece
    from megatron_export.formats import chosen

    written, form = tensors(exports[2]), chosen("toy4")
    pieces = {suffix: Piece(written[f"{LINEAR}.{suffix}"], ()) for suffix in form.stored}
    weight = tensors(model)[f"{LINEAR}.weight"].float()
    assert torch.equal(form.decode(pieces), form.requantize(weight, pieces))
    error = (form.decode(pieces) - weight).unflatten(1, (-1, 32)).abs().amax(2)
    assert (error <= pieces["weight_scale"].data * 0.5001).all()


def test_verify_finds_its_name_and_no_fault(exports: dict[int, Path], model: Path, toy4: None) -> None:
    status, said = command("verify", exports[2], "--reference", model, "--json")
    found = json.loads(said)
    assert (status, found["format"], found["problems"]) == (0, "toy4", [])


def test_engines_do_not_know_it_and_say_so(exports: dict[int, Path], toy4: None) -> None:
    status, said = command("check", exports[2])
    table = (exports[2].parent / "tp2.txt").read_text()
    assert status == 1
    assert [text.count("it does not know TOY4") for text in (said, table)] == [3, 3]


def test_a_model_that_modelopt_quantized_so_is_exported_in_it(toy4: None) -> None:
    assert recipe() == "toy4"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (FILE, "cannot import name 'toy4'"),
        (LINE, "--format: invalid choice: 'toy4'"),
        (GOLDEN, "the page has no json below '3. The golden'"),
        (QUANTIZERS, "weight_quantizer is int4 in blocks of 32: no format here does that"),
    ],
)
def test_without_one_of_the_steps_it_says_which_is_missing(
    step: str, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = without(PAGE, step)
    with using(follow(page, tmp_path)), pytest.raises(BaseException) as left:  # noqa: PT011 - whatever is raised
        planned(model)
        golden_of(page)
        recipe()
    assert said in f"{left.value}{capsys.readouterr().err}"


def test_every_field_of_a_format_is_explained_on_the_page_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == [field.name for field in fields(Form)]
