"""What users and their scripts hold on to: every flag, keyword, JSON key, `kind`, file name and row label, against stored lists.

A change that is meant changes a line of `contract/*.txt` and has one in CHANGELOG; any other is a mistake.
"""

import argparse
import inspect
import json
import re
import runpy
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_export

from ..support.models import EXAMPLE, GOLDEN
from ..support.ranks import Ranks, command, living

STORED = Path(__file__).parent / "contract"
LAUNCHER = Path(__file__).parents[2] / "launch" / "export.py"
SOURCE = GOLDEN / "models" / "qwen3moe-bf16"


def held(name: str, found: Iterable[str], folder: Path) -> None:
    """Fail unless these lines are those of the stored list of that name."""
    stored, written = STORED / f"{name}.txt", folder / f"{name}.txt"
    written.write_text("".join(f"{line}\n" for line in found))
    meant = f"if all of this is meant, and CHANGELOG tells of it: cp {written} {stored}"
    assert written.read_text().splitlines() == stored.read_text().splitlines(), meant


# Flags and keywords


def started(door: str, *arguments: object) -> object:
    """Run `launch/export.py`, or a module as `python -m` does, in this process; returns the exit status."""
    with mock.patch.object(sys, "argv", [door, *map(str, arguments)]), pytest.raises(SystemExit) as left:
        if door.endswith(".py"):
            runpy.run_path(str(LAUNCHER), run_name="__main__")
        runpy.run_module(door, run_name="__main__")
    return left.value.code


def command_lines(door: str, *name: str) -> Iterator[str]:
    """What a command is about, and its flags by name: of its parser, so that no terminal's width matters."""
    found: list[argparse.ArgumentParser] = []
    with mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser, file=None: found.append(parser)):
        assert started(door, *name, "--help") == 0
    [parser] = found
    yield " ".join([door, *name]) + f": {parser.description}"
    assert not parser.allow_abbrev  # a flag that comes later must not change what an abbreviation means
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (f"  {choice.dest}; {choice.help}" for choice in action._choices_actions)
        elif not action.option_strings:
            yield action_line(action)
    yield from sorted(action_line(action) for action in parser._actions if action.option_strings)


def action_line(action: argparse.Action) -> str:
    """All that a user sees of a flag or a positional argument, and what its value is where it is not given."""
    line = f"  {'/'.join(action.option_strings) or action.dest}"
    if action.nargs != 0:
        said = {
            "is": action.metavar or (None if action.choices else action.dest.upper()),
            "one of": action.choices and list(action.choices),
            "count": action.nargs,
            "type": action.type and action.type.__name__,
            "default": f"{action.default:g}" if isinstance(action.default, float) else action.default,
        }
        line += "".join(f"; {key} {value}" for key, value in said.items() if value is not None)
    return f"{line}{'; required' * action.required}; {action.help}"


def test_every_flag_of_every_command_is_as_it_was(tmp_path: Path) -> None:
    found = [*command_lines("launch/export.py"), *command_lines("megatron_export")]
    for name in ("export", "plan", "check", "verify", "diff"):
        found += command_lines("megatron_export", name)
    held("flags", found, tmp_path)


def test_every_keyword_of_the_library_is_as_it_was(tmp_path: Path) -> None:
    found = []
    for name in megatron_export.__all__:
        public = getattr(megatron_export, name)
        if inspect.isclass(public):
            members = [member for member in (*inspect.get_annotations(public), *vars(public)) if member[0] != "_"]
            found.append(f"{name}: {', '.join(sorted(set(members)))}")
            continue
        found.append(f"{name}:")
        parameters = inspect.signature(public).parameters.values()
        for parameter in sorted(parameters, key=lambda one: (one.kind, one.name * (one.kind is one.KEYWORD_ONLY))):
            default = "function" if inspect.isfunction(parameter.default) else repr(parameter.default)
            given = "" if parameter.default is parameter.empty else f" = {default}"
            found.append(f"  {parameter.name}{given} ({parameter.kind.description})")
    held("library", found, tmp_path)


# JSON keys, and rows of tables


def keys(title: str, text: str | bytes, values: bool = False) -> list[str]:
    """The paths of a JSON text, once each, below a title."""
    return [title, *(f"  {line}" for line in sorted(set(_paths(json.loads(text), values, ""))))]


def _paths(value: object, values: bool, path: str) -> Iterator[str]:
    """Each path with the type of what is there, or with the value itself; names of files and modules, and numbers, are *."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _paths(inner, values, f"{path}.*" if re.search(r"[./]|^\d+$", key) else f"{path}.{key}")
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _paths(inner, values and not isinstance(inner, str), f"{path}[]")
    else:
        exact = values or path == ".kind"
        yield f"{path[1:]}: {json.dumps(value) if exact else 'null' if value is None else type(value).__name__}"


def tensor_keys(title: str, file: Path) -> list[str]:
    """What the header of a safetensors file says: metadata, and of each module the names and dtypes of its tensors."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    metadata = header.pop("__metadata__", {})
    found = [title, *(f"  metadata {key}: {value}" for key, value in metadata.items() if value[0] != "{")]
    found += [f"  metadata {key}: {', '.join(json.loads(value))}" for key, value in metadata.items() if value[0] == "{"]
    modules: dict[str, dict[str, str]] = {}
    for name, said in sorted(header.items()):
        assert said.keys() == {"dtype", "shape", "data_offsets"}
        module, kind = re.fullmatch(MODULE, re.sub(r"\.\d+(?=\.)", ".*", name)).groups()
        modules.setdefault(module, {})[kind] = said["dtype"]
    return [*found, *(f"  {module}: {', '.join(map(' '.join, kinds.items()))}" for module, kinds in modules.items())]


MODULE = r"(.*(?:proj|linear_\w+|experts|self_attention)|[^.]+(?:\.[^.]+)*?)\.([^.]+|.+)"


def labels(title: str, said: str) -> str:
    """The labels of a table's rows, in its order, once each; those that name weights are left out."""
    found = dict.fromkeys(line.partition("  ")[0] for line in said.splitlines() if "  " in line.lstrip())
    return f"{title}: {', '.join(label for label in found if label and '.' not in label)}"


FORMATS = {  # folder -> search whose statistics it is made with, flags
    "bf16": ("", ("--format", "bf16")),
    "fp8": ("nvfp4_awq", ("--format", "fp8", "--kv-cache", "fp8", "--max-shard-size", "500KB")),
    "fp8_pb": ("", ("--format", "fp8_pb")),
    "nvfp4": ("nvfp4_awq", ("--format", "nvfp4", "--kv-cache", "nvfp4")),
    "nvfp4_awq modelopt": ("nvfp4_awq", ("--format", "nvfp4_awq", "--awq-output", "modelopt")),
    "w4a8_awq": ("int4_awq", ("--format", "w4a8_awq", "--kv-cache", "fp8")),
}
SEARCHED = ("nvfp4_awq", "int4_awq")


@pytest.fixture(scope="module")
def made(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with checkpoints of every format, their statistics and journals; by checkpoint, the labels of the table shown."""
    base, shown = tmp_path_factory.mktemp("made"), {}
    batches = load_file(SOURCE / "calib_input_ids.safetensors")
    save_file({"input_ids": torch.cat([batches[f"input_ids.{n}"] for n in range(2)])}, base / "ids.safetensors")

    def run(name: str, *flags: object, source: Path = SOURCE, status: int = 0) -> None:
        line = ("--device", "cpu", "--hf-model", source, "--output", base / name, *flags)
        ((left, said),) = living(pool).call(1, command, *line)
        assert left == status, said
        shown[name] = labels(f"export, {name}", said)

    measuring = ("--calib-data", base / "ids.safetensors", "--calib-samples", 4, "--calib-seq-len", 24)
    for form in SEARCHED:
        searched = ("--format", form, "--awq-clip", *measuring, "--save-calibration", base / f"{form}.safetensors")
        run(form, *searched, "--verify", "--min-snr", 99, status=1)  # not published, and its journal stays
        shutil.copytree(base / f".{form}.journal", base / f"journal of {form}")
        run(form, *searched, "--resume", "--report")
    for name, (form, flags) in FORMATS.items():
        run(name, *flags, *(("--load-calibration", base / f"{form}.safetensors") if form else ()))
    run("example", "--format", "fp8_pb", source=EXAMPLE)
    run("nothing", "--format", "fp8", *measuring, "--dry-run")
    return base, shown


def test_every_file_and_key_of_a_finished_folder_is_as_it_was(made: tuple, tmp_path: Path) -> None:
    base, found = made[0], []
    for folder in (base / name for name in (*FORMATS, *SEARCHED)):
        found.append(f"{folder.name}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        config = json.loads((folder / "config.json").read_text())
        if folder.name == "bf16":
            assert "quantization_config" not in config
            continue
        found += keys("quantization_config of config.json", json.dumps(config["quantization_config"]), values=True)
        found += keys("hf_quant_config.json", (folder / "hf_quant_config.json").read_bytes(), values=True)
    found += keys("export_manifest.json", (base / "nvfp4_awq" / "export_manifest.json").read_bytes())
    found += keys("model.safetensors.index.json", (base / "fp8" / "model.safetensors.index.json").read_bytes())
    for form in SEARCHED:
        found += tensor_keys(f"model.safetensors, {form}", base / form / "model.safetensors")
    held("folder", found, tmp_path)


def test_every_key_of_a_journal_and_of_statistics_is_as_it_was(made: tuple, tmp_path: Path) -> None:
    base, found = made[0], []
    for form in SEARCHED:
        journal = base / f"journal of {form}"
        found.append(f"{journal.name}: {', '.join(sorted(path.name for path in journal.iterdir()))}")
        first, second, *_ = (journal / "journal.jsonl").read_text().splitlines()
        found += keys("journal.jsonl, first line", first.partition(" ")[2])
        found += keys("journal.jsonl, other lines", second.partition(" ")[2])
        found += tensor_keys("statistics.safetensors", journal / "statistics.safetensors")
        found += tensor_keys(f"calibration file, {form}", base / f"{form}.safetensors")
    held("statistics", found, tmp_path)


def test_every_printed_key_and_label_is_as_it_was(made: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, shown = made
    found = [shown[name] for name in ("nvfp4_awq", "example", "nothing")]

    def printed(*arguments: object, status: int = 0) -> str:
        assert started("megatron_export", *arguments) == status
        return capsys.readouterr().out

    text = ("--text", EXAMPLE / "heldout.txt", "--windows", 2)
    told: dict[str, tuple[tuple, int]] = {
        "plan": (("plan", "--hf-model", SOURCE, "--format", "nvfp4", "--tp", 2, "--exclude", "*.layers.1.*"), 0),
        "check": (("check", base / "fp8"), 0),
        "verify": (("verify", base / "w4a8_awq", "--reference", SOURCE, "--device", "cpu"), 0),
        "verify --text": (("verify", base / "example", "--reference", EXAMPLE, "--device", "cpu", *text), 0),
        "diff of formats": (("diff", base / "nvfp4", base / "fp8"), 1),
        "diff of numbers": (("diff", base / "nvfp4", base / "nvfp4_awq"), 1),
    }  # fmt: skip
    for title, (arguments, status) in told.items():
        if title != "check":  # which prints a list
            found.append(labels(title, printed(*arguments, status=status)))
        found += keys(f"{title} --json", printed(*arguments, "--json", status=status))
    held("commands", found, tmp_path)
