"""The pages say what is there: commands that run, flags that exist, links and paths that lead somewhere, measured numbers."""

import argparse
import ast
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

import megatron_export
from megatron_export.cli import export_command
from megatron_export.cli.config import ExportConfig
from megatron_export.common.options import flag_of, options_of
from megatron_export.formats import FORMATS, KV_FORMATS
from megatron_export.formats.nvfp4 import e2m1_codes
from megatron_export.models import ARCHITECTURES

from .support.models import EXAMPLE
from .support.ranks import command, living

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")}
PAGES |= {f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
STARTS = ("torchrun ", "python ", "pytest", "pip install", "sbatch ", "megatron-export ")
SUBCOMMANDS = ("export", "plan", "check", "verify", "diff")
SHORT = ("--device", "cpu", "--calib-samples", "2", "--calib-seq-len", "32")  # for exports that are run here
HUB = re.compile(r"[\w-]+/[\w.-]*\d[\w.-]*[A-Z][\w.-]*")  # Qwen/Qwen3-8B, and no folder of these pages
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@dataclass(frozen=True)
class Command:
    """A command of a page: what is started, as words, and the flags after it."""

    text: str
    start: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The script, or the subcommand of megatron-export."""
        return f"megatron-export {self.start[-1]}" if self.start[-1] in SUBCOMMANDS else self.start[-1]

    @property
    def exports(self) -> bool:
        """Whether it is an export, however it is started."""
        return self.name in ("launch/export.py", "megatron-export export")

    @property
    def world(self) -> int:
        """How many ranks torchrun starts; 1 without it."""
        words = [*self.start[1:]] if self.start[0] == "torchrun" else ["script"]
        return int(get_args_parser().parse_args(words).nproc_per_node)

    @property
    def runs_here(self) -> bool:
        """Whether two processes on a CPU can run it: it needs no hub, no Megatron checkpoint and no more ranks."""
        if self.exports:
            return not {"--hf-model", "--megatron-checkpoint", "--dcp-checkpoint"} & set(self.flags)
        known = self.name.startswith("megatron-export ") and "--megatron-checkpoint" not in self.flags
        return known and not any(HUB.fullmatch(flag) for flag in self.flags)


def commands() -> dict[str, Command]:
    """Every command of every page, by its text."""
    found = {}
    for page in PAGES.values():
        blocks = [block for language, block in FENCE.findall(page) if not language]
        lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split(" && ")]
        for text in [*lines, *INLINE.findall(FENCE.sub("", page))]:
            text = re.sub(r"^(\w+=\S+ )+", "", text)
            if text.startswith(STARTS):
                found[text] = _command(text)
    return found


def _command(text: str) -> Command:
    words = shlex.split(text)
    end = 0
    if words[0] in ("torchrun", "python", "sbatch"):
        script = next((n for n, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
        end = words.index("-m") + 2 if script is None else script  # or the module and its subcommand
    if words[0] == "megatron-export":
        end = 1
    return Command(text, tuple(words[: end + 1]), tuple(words[end + 1 :]))


COMMANDS = commands()
RUN = {text: one for text, one in COMMANDS.items() if one.runs_here}
EXPORTS = [one for one in RUN.values() if one.exports]


def test_every_kind_of_command_is_shown_and_run() -> None:
    assert {one.name.split()[-1] for one in RUN.values()} == {"launch/export.py", *SUBCOMMANDS}
    assert {one.name for one in COMMANDS.values()} - {one.name for one in RUN.values()} == {
        *(
            "launch/benchmark.py",
            "launch/slurm.sh",
            "examples/export_from_training.py",
            "examples/export_in_megatron_lm.py",
            "examples/train_draft.py",
        ),  # run by tests of their own
        *("tests/mutations.py", "tests/engines/changed_sources.py", "pip", "pytest"),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pool: list) -> Iterator[Path]:
    """A folder in which the exports of the pages were run, one after the other; their `--output` is in it."""
    folder = tmp_path_factory.mktemp("docs")
    ranks = living(pool)
    for one in EXPORTS:
        flags = [str(folder / word) if Path(word).suffix == ".safetensors" else word for word in one.flags]
        where = flags.index("--output") + 1
        flags[where] = str(folder / flags[where])
        for status, said in ranks.call(one.world, command, *flags, *SHORT):
            assert status == 0, f"{one.text}\n{said}"
    return folder


@pytest.mark.whole
@pytest.mark.parametrize("text", [text for text, one in RUN.items() if one not in EXPORTS])
def test_commands_that_a_cpu_can_run_do_run(
    text: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    (place / "examples").mkdir(exist_ok=True)
    model = place / "examples" / "model"
    model.is_symlink() or model.symlink_to(EXAMPLE)
    status = _started(RUN[text], monkeypatch)
    said = capsys.readouterr()
    assert (status, said.err.count("error:")) == (1 if "diff" in text else 0, 0), said.err
    assert said.out


class Parsed(Exception):
    """The flags were read."""


@pytest.mark.parametrize(
    "text", [text for text, one in COMMANDS.items() if one.exports or one.name.endswith((".py", ".sh"))]
)
def test_flags_of_commands_that_need_more_than_a_cpu_exist(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = COMMANDS[text]
    sizes = [int(one.flags[one.flags.index(flag) + 1]) for flag in ("--tp", "--pp") if flag in one.flags]
    assert one.start[0] != "torchrun" or one.world % prod(sizes) == 0
    if one.start[0] == "sbatch":
        script = (ROOT / one.start[-1]).read_text()
        assert all(f"#SBATCH {word.partition('=')[0]}=" in script for word in one.start[1:-1])
    if one.exports or one.name == "launch/slurm.sh":
        assert export_command.parse([*one.flags])
    else:
        _only_parsed(one, monkeypatch)


@pytest.mark.parametrize(
    "text", [text for text, one in COMMANDS.items() if "megatron-export" in one.name and not one.exports]
)
def test_flags_of_commands_without_ranks_exist(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _only_parsed(COMMANDS[text], monkeypatch)


@pytest.mark.parametrize("text", [text for text, one in COMMANDS.items() if one.name in ("pip", "pytest")])
def test_tests_and_packages_that_pages_name_exist(text: str, pytestconfig: pytest.Config) -> None:
    flags = [*COMMANDS[text].flags]
    if COMMANDS[text].name == "pip":
        named = re.findall(r"\[([\w,]+)\]", text)
        assert all(extra in EXTRAS for group in named for extra in group.split(","))
        assert all((ROOT / flags[n + 1]).is_file() for n, flag in enumerate(flags) if flag == "-c")
        return
    known, unknown = pytestconfig._parser.parse_known_and_unknown_args(flags)
    assert not unknown
    assert all((ROOT / path).exists() for path in known.file_or_dir)
    marks = {mark.partition(":")[0] for mark in pytestconfig.getini("markers")}
    assert set(re.findall(r"\w+", known.markexpr)) - {"and", "or", "not"} <= marks | {""}


def test_every_command_that_ci_runs_makes_an_environment_and_tests_in_it() -> None:
    marks = re.findall(r"^ *run_after '(<!-- \w+ -->)'", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert "<!-- tests -->" in marks
    for mark in marks:
        first, *others = re.search(f"{mark}\n```\n(.*?)```", PAGES["CONTRIBUTING.md"], flags=re.DOTALL)[1].splitlines()
        assert first.startswith("python3 -m venv ") and "pytest" in others[-1]


def _only_parsed(one: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args: object, **kwargs: object) -> None:
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        _started(one, monkeypatch)


def _started(one: Command, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a command, in this process; argparse's 2 for flags that do not exist."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # read when the example is imported
    with pytest.raises(SystemExit) as left:
        if one.name.startswith("megatron-export"):
            monkeypatch.setattr(sys, "argv", ["megatron-export", one.name.split()[1], *one.flags])
            runpy.run_module("megatron_export", run_name="__main__")
        else:
            script = ROOT / one.name
            monkeypatch.setattr(sys, "argv", [str(script), *one.flags])
            monkeypatch.syspath_prepend(script.parent)
            runpy.run_path(str(script), run_name="__main__")
    return left.value.code


def test_every_flag_is_explained_with_its_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    export, *others = re.split(r"^## (?=What will|Flags of)", PAGES["docs/command.md"], flags=re.MULTILINE)
    config = {flag_of(one).removeprefix("--"): one.default for one in options_of(ExportConfig).values()}
    shown = _flags(export)
    assert shown.keys() == config.keys()
    for name, default in config.items():
        if default not in (None, True, False, (), ""):
            assert shown[name].split()[0] == (f"{default:g}" if isinstance(default, float) else str(default)), name
    for text, name in zip(others, ("plan", "check", "verify", "diff"), strict=True):
        helped = _helped(name, monkeypatch, capsys)
        assert _flags(text).keys() == helped - (shown.keys() if name == "plan" else set()), name


def _flags(text: str) -> dict[str, str]:
    """Flags that blocks explain -> what follows each, default first."""
    lines = [line for language, block in FENCE.findall(text) for line in block.splitlines() if line.startswith("--")]
    return {line.split()[0].removeprefix("--"): line.split(maxsplit=1)[1] for line in lines}


def _helped(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> set[str]:
    monkeypatch.setenv("COLUMNS", "300")
    assert _started(Command("", ("megatron-export", name), ("--help",)), monkeypatch) == 0
    return set(re.findall(r"^ +(?:-\w, )?--([\w-]+)", capsys.readouterr().out, flags=re.MULTILINE)) - {"help"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_and_headings(page: str) -> None:
    for file, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {file}"
        if heading:
            assert heading in _headings(path.read_text()), f"{page}: {file}#{heading}"


def _headings(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    for text in INLINE.findall(FENCE.sub("", PAGES[page])):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", text) and re.search(
            r"^(tests|launch|examples|docs)/|\.(py|sh|md)$", text
        ):
            assert (ROOT / text).exists() or (ROOT / "megatron_export" / text).exists(), f"{page}: {text}"


def test_python_on_the_pages_is_python_and_names_what_there_is() -> None:
    blocks = [block for page in PAGES.values() for language, block in FENCE.findall(page) if language == "python"]
    names = {node.id for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
    assert {"calibrate", "export_hf_checkpoint", "export_hf_checkpoint_async", "iter_hf_tensors"} <= names
    assert all(hasattr(megatron_export, name) for name in names if re.search(r"_hf_|calibrat(e|ion)$", name))


def test_every_architecture_and_format_is_in_the_support_table() -> None:
    table = PAGES["README.md"].split("| | supported |")[1].split("## ")[0]
    for name in (*ARCHITECTURES, *(f"`{form}`" for form in (*FORMATS, *KV_FORMATS))):
        assert name in table
    assert all(f"\n| `{form}` |" in PAGES["docs/formats.md"] for form in FORMATS)


def test_the_examples_numbers_are_those_of_its_training() -> None:
    quality, training = PAGES["docs/quality.md"], json.loads((EXAMPLE / "training.json").read_text())
    assert f"untrained it is {training['untrained_perplexity']:.0f}" in quality
    assert f"trained with Megatron-Core for {training['seconds'] / 60:.1f} minutes" in quality
    table = quality.split("<!-- quality -->")[1].split("<!-- /quality -->")[0]
    assert all(f"\n| {form} |" in table for form in FORMATS)
    shown = float(re.search(r"\| bf16 \|[^|]*\|[^|]*\| ([\d.]+) \|", table)[1])
    assert abs(shown - training["heldout_perplexity"]) < 0.01  # measured by transformers, not by Megatron
    assert training["heldout_perplexity"] < training["untrained_perplexity"] / 100


def test_the_example_model_stays_small() -> None:
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 12_000_000


@pytest.mark.whole
def test_the_shard_walked_on_paper_ends_at_its_byte(place: Path) -> None:
    said = re.search(r"\*\*byte ([\d,]+)\*\*", PAGES["docs/architecture.md"])[1]
    file = place / "export" / "nvfp4" / "model.safetensors"
    name = "model.layers.1.self_attn.q_proj.weight"
    written, weight = load_file(file), load_file(EXAMPLE / "model.safetensors")[name][256, :2].float()
    scale = written[f"{name}_scale"][256, 0].float() * written[f"{name}_scale_2"]
    low, high = e2m1_codes(weight / scale).tolist()
    assert file.read_bytes()[int(said.replace(",", ""))] == low | high << 4
