"""What files of strangers say is text on a screen: every string of a folder is made one that steers terminals, and all that every
command shows of it is looked at.
"""

import json
import logging
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_export import ExportError
from megatron_export.cli import commands, terminal
from megatron_export.common.errors import message_of
from megatron_export.distributed import last_words

from ..support.models import GOLDEN, read_json
from ..support.ranks import Ranks, command

EVIL = "\x1b[31m\x1b]0;title\x07\x9b2J\u202eevil\u2066\u200b\r\x7f\nFORGED  loads"
ORIGINAL, QUANTIZED = GOLDEN / "models" / "llama-bf16", GOLDEN / "models" / "llama-FP8-KVFP8"


def spoiled(value: Any) -> Iterator[Any]:
    """Copies of a JSON value, in each of which one key or one other value steers a terminal."""
    if isinstance(value, dict):
        for key, inner in value.items():
            others = {name: one for name, one in value.items() if name != key}
            yield others | {key + EVIL: inner}
            yield from (others | {key: one} for one in spoiled(inner))
    elif isinstance(value, list):
        for n, inner in enumerate(value):
            yield from ([*value[:n], one, *value[n + 1 :]] for one in spoiled(inner))
    else:
        yield f"{value}{EVIL}" if isinstance(value, str) else EVIL
        yield [EVIL]
        yield {EVIL: EVIL}


def assert_harmless(said: str, where: object) -> None:
    assert all(one.isprintable() or one in "\n\t" for one in said), (where, said)
    assert not any(line.startswith("FORGED") for line in said.splitlines()), (where, said)


@pytest.fixture
def shown(capfd: pytest.CaptureFixture) -> Callable[..., str]:
    """What a command shows, on whatever way; a Traceback is nothing to be shown."""

    def run(*flags: object) -> str:
        said: list[str] = []
        commands.main(lambda *words, **_: said.append(" ".join(map(str, words))), [str(flag) for flag in flags])
        text = "\n".join([*said, *capfd.readouterr()])
        assert_harmless(text, flags)
        return text

    return run


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if path.name in ("config.json", "hf_quant_config.json", "model.safetensors"):
            shutil.copy(path, target)
    return target


CASES = {
    "config.json": (QUANTIZED, "config.json"),
    "hf_quant_config.json": (QUANTIZED, "hf_quant_config.json"),
    "config.json of a model": (ORIGINAL, "config.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_string_of_a_config_steers_a_terminal(case: str, shown: Callable, tmp_path: Path) -> None:
    source, file = CASES[case]
    folder, said = copied(source, tmp_path / "folder"), []
    for one in spoiled(read_json(source / file)):
        (folder / file).write_text(json.dumps(one))
        said.append(shown("check", folder) + shown("check", folder, "--json"))
        if source is ORIGINAL:
            said.append(shown("plan", "--hf-model", folder, "--format", "fp8"))
    assert any("\\x1b" in text for text in said)  # it was shown, as text


@pytest.mark.whole
@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_no_string_that_verify_or_diff_read_steers_a_terminal(file: str, shown: Callable, tmp_path: Path) -> None:
    folder, said = copied(QUANTIZED, tmp_path / "folder"), []
    whole = read_json(QUANTIZED / file)
    read = {"hf_quant_config.json": "quantization", "config.json": "quantization_config"}[file]
    for one in spoiled(whole[read]):
        if not any(isinstance(value, list | dict) and EVIL in value for value in one.values()):  # as above
            (folder / file).write_text(json.dumps(whole | {read: one}))
            said.append(shown("verify", folder, "--reference", ORIGINAL, "--device", "cpu"))
    (folder / file).write_text(json.dumps({f"{key}{EVIL}": f"{value}{EVIL}" for key, value in whole.items()}))
    said.append(shown("diff", QUANTIZED, folder) + shown("diff", QUANTIZED, folder, "--json"))
    assert any("\\x1b" in text for text in said)


def rename_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[f"lm_head{EVIL}"] = header.pop("lm_head.weight")
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rename_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / f"model{EVIL}.safetensors")


def break_file(folder: Path) -> None:
    (folder / f"other{EVIL}.safetensors").write_bytes(EVIL.encode())


def index(folder: Path) -> None:
    homes = {f"lm_head{EVIL}": "model.safetensors", "lm_head.weight": f"{EVIL}.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


def manifest(folder: Path) -> None:
    said = {"files": {f"a{EVIL}": {"sha256": EVIL}}, "run": {"hf_model": f"x{EVIL}", EVIL: EVIL}, EVIL: EVIL}
    (folder / "export_manifest.json").write_text(json.dumps({"kind": "megatron_export manifest 1", **said}))


def listed(folder: Path) -> None:
    said = {"files": {"model.safetensors": {"sha256": EVIL}}, "run": {"hf_model": f"org/{EVIL}"}}
    (folder / "export_manifest.json").write_text(json.dumps({"kind": "megatron_export manifest 1", **said}))


def tokenizer(folder: Path) -> None:
    (folder / f"tokenizer{EVIL}.json").write_text(EVIL)


DAMAGES = (rename_tensor, rename_file, break_file, index, manifest, listed, tokenizer)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_name_in_a_folder_steers_a_terminal(damage: Callable, shown: Callable, tmp_path: Path) -> None:
    folder, original = copied(QUANTIZED, tmp_path / "folder"), copied(ORIGINAL, tmp_path / "original")
    for one in (folder, original):
        damage(one)
    shown("check", folder)
    shown("diff", QUANTIZED, folder)
    shown("diff", folder, QUANTIZED, "--json")
    shown("verify", folder)
    shown("verify", folder, "--reference", ORIGINAL, "--device", "cpu")
    shown("verify", QUANTIZED, "--reference", original, "--device", "cpu")
    shown("plan", "--hf-model", original, "--format", "fp8")


def test_no_folder_that_an_export_is_given_steers_a_terminal(ranks: Ranks, tmp_path: Path) -> None:
    config = read_json(ORIGINAL / "config.json")
    keys = ("architectures", "hidden_act", "rope_scaling", "dtype", "num_hidden_layers", "model_type", "head_dim")
    for n, change in enumerate([*({key: one} for key in keys for one in (EVIL, [EVIL])), *DAMAGES]):
        folder = copied(ORIGINAL, tmp_path / f"{n}{EVIL.partition(chr(10))[0]}")
        if callable(change):
            change(folder)
        else:
            (folder / "config.json").write_text(json.dumps(config | change))
        flags = ("--device", "cpu", "--hf-model", folder, "--format", "bf16", "--output", tmp_path / "out", "--dry-run")
        ((_, said),) = ranks.call(1, command, *flags)
        assert said
        assert_harmless(said, change)


def test_an_error_is_clean_wherever_it_is_shown() -> None:
    assert "\x1b" not in str(ExportError(EVIL))
    assert "\\x1b[31m" in str(ExportError(EVIL))
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        assert_harmless(message_of(error).replace("\nFORGED", ""), "message_of")


def test_what_torchrun_is_left_to_show_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(last_words.FILE, str(tmp_path / "error.json"))
    last_words.leave(EVIL)
    left = json.loads((tmp_path / "error.json").read_text())["message"]
    for said in (left["message"], left["extraInfo"]["py_callstack"]):
        assert "\\x1b[31m" in said
        assert_harmless(said.replace("\nFORGED", ""), "torchrun")


def test_a_persons_table_has_no_escapes_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "pretty", lambda stream=None: True)
    link = "[link=http://x]name[/link]"
    said = []
    say = terminal.cleaned(lambda *words, **_: said.extend(words))
    say(terminal.rows([("format", EVIL), ("problem", link)], "title"))
    say(terminal.grid(("weight", "dB"), [[EVIL, "1"], [link, "2"], ["[/odd]", "3"]], "title"))
    for text in said:
        assert "\x1b[" in text  # rich's
        for steering in ("\x1b[31mx", "\x1b]", "\x07", "\x9b", "\u202e", "\u2066", "\r", "\x7f"):
            assert steering not in text, text
        assert "[/link]" in text.replace("\n", "")
    say(EVIL)
    assert_harmless(said[-1].replace("\nFORGED", ""), "say")


def test_what_a_library_logs_is_clean(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logging.getLogRecordFactory()
    try:
        terminal.clean_logs()
        terminal.clean_logs()
        logger = logging.getLogger("somebody")
        logger.addHandler(handler := logging.StreamHandler(sys.stderr))
        logger.warning("of type %s", EVIL)
        logger.removeHandler(handler)
    finally:
        logging.setLogRecordFactory(before)
    said = capfd.readouterr().err
    assert "of type \\x1b[31m" in said
    assert_harmless(said.replace("\nFORGED", ""), "log")
