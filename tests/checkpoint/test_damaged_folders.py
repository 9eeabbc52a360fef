"""Source folders that were damaged, or made to do damage: each is read, or refused with a sentence, in bounded memory; nothing
is written, run or unpickled.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_export.checkpoint import hf_folder
from megatron_export.checkpoint.hf_weights import SourceWeights, copied_tensors
from megatron_export.common.errors import ExportError
from megatron_export.common.file_names import INDEX
from megatron_export.models import architecture_of, copied_prefixes, parameters_of, rope_of, settings_of, shape_of
from megatron_export.models.sources import expected_shapes

from ..support.models import ARCHITECTURES
from ..support.plans import plan_of

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "head_dim": 8,
    "norm_topk_prob": True,
    "sliding_window": None,
}
NAMES = {
    "llama31": "LlamaForCausalLM",
    "qwen2_yarn": "Qwen2ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama4": "Llama4ForCausalLM",
}
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MOST_SECONDS, MOST_MEMORY = 20, 500 << 20


# The folders, and what reads them.


def make_folder(folder: Path, name: str) -> None:
    """A small checkpoint of zeros in two files."""
    sizes = {**SMALL, "mlp_only_layers": [], **{k: v for k, v in ARCHITECTURES[name].items() if "num_hidden" not in k}}
    config = {"architectures": [NAMES[name]], **sizes}
    shapes = expected_shapes(parameters_of(config).values())
    tensors = {tensor: torch.zeros(shape, dtype=torch.bfloat16) for tensor, shape in shapes.items()}
    homes = {tensor: FILES[number % 2] for number, tensor in enumerate(tensors)}
    folder.mkdir()
    for file in FILES:
        save_file({tensor: tensors[tensor] for tensor, home in homes.items() if home == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": homes}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


def read(folder: Path) -> None:
    """All that one process does to a source before it has a model."""
    found = hf_folder.find_model(folder, weights=True)
    config = hf_folder.read_config(found)
    architecture_of(config)
    settings_of(config)
    rope_of(config)
    shape_of(config)
    sources = parameters_of(config).values()
    copied = copied_tensors(found, copied_prefixes(config))
    plan_of(config, format="fp8", copied=copied)
    with SourceWeights(found) as weights:
        weights.check(expected_shapes(sources), {name for source in sources for name in source.copies()})
        for source in list(sources)[:6]:
            for part in source.names():
                weights.read_part(source, part, (slice(0, 3),))


# What is done to them: each takes a folder and a source of chance, and damages one file.


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1000, 2**31, 2**63, 2**64, 10**9, 10**30, -(10**30), 1 << 4000),
    *(0.5, -0.5, 1.5, 1e-30, 1e308, -0.0, float("nan"), float("inf"), float("-inf")),
    *("", "4", "x" * 5000, "\x1b[2J", "\ud800", "a\0b", "../../etc/passwd", "/etc/passwd", "yarn", "llama3", "linear"),
    *([], [[]], [0], [1, 2], [-1], [10**9], ["x"], [None], [True, False], list(range(2000)), [0, 1] * 600),
    *({}, {"": None}, {"a": {"b": {}}}, {"rope_type": "yarn"}, {"rope_type": 3}, {"factor": "x"}),
]


def structured(found: Any, chance: Random) -> Any:
    """A JSON value with one to three changes anywhere in it."""
    made = deepcopy(found)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        holder, keys = made, list(made)
        while True:
            key = chance.choice(keys) if keys else None
            inner = holder[key] if key is not None and isinstance(holder, dict) else None
            if not isinstance(inner, dict) or not inner or chance.random() < 0.3:
                break
            holder, keys = inner, list(inner)
        what = chance.random()
        if key is None or what < 0.1:
            holder["extra" if chance.random() < 0.5 else chance.choice(WORDS)] = chance.choice(VALUES)
        elif what < 0.25:
            del holder[key]
        elif what < 0.35:
            holder[str(chance.choice(VALUES))] = holder.pop(key)
        elif what < 0.55 and isinstance(holder[key], (int, float)):
            old = holder[key]
            holder[key] = chance.choice((old + 1, old - 1, old * 2, -old, old // 2))
        else:
            holder[key] = chance.choice(VALUES)
    return made


WORDS = [
    "text_config", "quantization_config", "layer_types", "no_rope_layers", "moe_layers", "mlp_only_layers", "head_dim",
    "num_nextn_predict_layers", "rope_scaling", "rope_parameters", "n_group", "topk_group", "kv_lora_rank", "num_experts",
    "tie_word_embeddings", "attention_bias", "__metadata__", "weight_map", "dtype", "shape", "data_offsets",
]  # fmt: skip


def bitten(text: bytes, chance: Random) -> bytes:
    """Bytes with some of them changed, lost, or more."""
    what, place = chance.randrange(9), chance.randrange(max(len(text), 1))
    if what == 0:
        return text[:place]
    if what == 1:
        return text[:place] + chance.randbytes(chance.randrange(1, 9)) + text[place:]
    if what == 2:
        return text[:place] + chance.randbytes(1) + text[place + 1 :]
    if what == 3:
        return text[:place] + text[place + chance.randrange(1, 40) :]
    if what == 4:
        return "\ufeff".encode() + text if chance.random() < 0.5 else text.decode("latin1").encode("utf-16")
    if what == 5:
        deep = chance.choice((60, 900, 5000, 100_000))
        return chance.choice((b"[" * deep, b'{"a":' * deep, b"[" * deep + b"]" * deep, text[:place] + b"[" * deep))
    if what == 6:
        end = text.find(b",", place)
        return text[:end] + b"," + text[text.rfind(b",", 0, end) + 1 : end] + text[end:] if end > 0 else text
    if what == 7:
        number = chance.choice((b"1e999", b"-0", b"9" * 5000, b"NaN", b"-Infinity", b"1e-400", b"0x10"))
        return re.sub(rb"\d+", number, text, count=chance.randrange(1, 4))
    return text.replace(*chance.choice(((b'"', b"'"), (b":", b""), (b",", b",,"), (b"}", b""), (b"[", b"{"))), 1)


def damage_json(name: str) -> Callable[[Path, Random], None]:
    def damage(folder: Path, chance: Random) -> None:
        text = (folder / name).read_bytes()
        whole = chance.random() < 0.8
        made = json.dumps(structured(json.loads(text), chance)).encode() if whole else bitten(text, chance)
        (folder / name).write_bytes(made)

    return damage


def damage_header(folder: Path, chance: Random) -> None:
    path = folder / chance.choice(FILES)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    what = chance.random()
    if what < 0.5:
        header = json.dumps(tampered(json.loads(header), chance)).encode()
    elif what < 0.65:
        header = json.dumps(structured(json.loads(header), chance)).encode()
    elif what < 0.85:
        header = bitten(header, chance)
    stated = len(header)
    if what > 0.85:
        stated = chance.choice((0, 1, stated - 1, stated + 1, len(content), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1))
    if what > 0.95:
        data = data[: chance.randrange(len(data))]
    path.write_bytes(stated.to_bytes(8, "little") + header + data)


def tampered(header: dict, chance: Random) -> dict:
    """A header that is one, but lies."""
    name, other = chance.sample([name for name in header if name != "__metadata__"], 2)
    one = header[name]
    what = chance.randrange(8)
    if what == 0:
        one["dtype"] = chance.choice(("F64", "F8_E4M3", "F4", "F6_E2M3", "I8", "BOOL", "C64", "U64", "X", "", 3, None))
    elif what == 1:
        one["shape"] = chance.choice(
            ([], [0], [-1], [2**63], [2**63, 0], [2**33, 2**33], [1.5], [True], "x", [one["shape"]])
        )
    elif what == 2:
        one["shape"] = [*one["shape"], *[1] * chance.choice((1, 70, 1000))]
    elif what == 3:
        shift = chance.choice((-2, 2, 64, 10**9, 2**63))
        one["data_offsets"] = [max(offset + shift, chance.choice((0, -1))) for offset in one["data_offsets"]]
    elif what == 4:
        one["data_offsets"] = chance.choice(
            ([], [0], [0, 0], one["data_offsets"][::-1], [0, 2**64], header[other]["data_offsets"])
        )
    elif what == 5:
        header[chance.choice(("", "\x1b[31m", "x" * 600, "a\nb", "__metadata__", other))] = header.pop(name)
    elif what == 6:
        header["__metadata__"] = chance.choice(({"a": 1}, {"a": {}}, [], "x", None, {"a": "b" * 10_000}))
    else:
        header[name], header[other] = header[other], header[name]
    return header


def damage_files(folder: Path, chance: Random) -> None:
    name = chance.choice((*FILES, INDEX, "config.json", "tokenizer.json", "LICENSE", "vocab.txt"))
    path, outside = folder / name, folder.parent / "outside"
    path.unlink(missing_ok=True)
    what = chance.randrange(7)
    if what == 0:
        path.symlink_to(chance.choice((outside, "../outside", "/dev/zero", "/etc/passwd", "/proc/self/mem")))
    elif what == 1:
        path.symlink_to(chance.choice(("nowhere", name, FILES[0], "..", ".")))
    elif what == 2:
        os.mkfifo(path)
    elif what == 3:
        path.mkdir()
    elif what == 4:
        path.write_bytes(b"")
    elif what == 5:
        with path.open("wb") as file:
            file.write(chance.choice((10**8, 10**7, 3 << 20)).to_bytes(8, "little"))
            file.truncate(10**10)  # all zeros, none on disk
    else:
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


DAMAGES = {
    "config": (damage_json("config.json"), 5),
    "index": (damage_json(INDEX), 2),
    "header": (damage_header, 3),
    "files": (damage_files, 1),
}


# What is watched.


ACTING = [f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "link", "symlink", "truncate", "chmod")]
RUNNING = [f"os.{name}" for name in ("system", "exec", "fork", "posix_spawn")]
RUNNING += ["pickle.find_class", "subprocess.Popen", "socket.connect"]
_watched: list[list[str]] = []


def _hook(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ACTING + RUNNING or event.startswith("shutil."):
        _watched[-1].append(f"{event} {arguments!r}")


@cache
def _install() -> None:
    sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is written, run or unpickled meanwhile. Hooks cannot be taken away, so there is one, that sleeps in between."""
    _install()
    _watched.append([])
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def fresh_peak() -> int:
    """Forget the most memory that this process ever had; returns what it has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most memory that this process had since, in bytes."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def assert_a_sentence(message: str) -> None:
    assert re.search(r"(\S+ ){4}", message), message
    assert len(message) < 20_000, message[:500]
    assert all(line.isprintable() for line in message.split("\n")), message
    assert not re.search(r"Traceback|(Key|Type|Attribute|Index|Overflow|Runtime|Recursion)Error", message), message


def fuzz(folder: Path, count: int, seed: int) -> tuple[dict[str, list[int]], float, int]:
    """Kind of damage -> how many inputs were tried and refused; the slowest input's seconds; how much memory grew."""
    folder.mkdir(exist_ok=True)
    (folder / "outside").write_text('{"a secret": 1}')
    for name in NAMES:
        make_folder(folder / name, name)
        read(folder / name)
    kinds = [kind for kind, (_, weight) in DAMAGES.items() for _ in range(weight)]
    counts = {kind: [0, 0] for kind in DAMAGES}
    slowest, before = 0.0, fresh_peak()
    for number in range(count):
        chance = Random(f"{seed} {number}")
        name, kind = chance.choice(list(NAMES)), chance.choice(kinds)
        source = folder / "damaged"
        shutil.copytree(folder / name, source)
        DAMAGES[kind][0](source, chance)
        started = time.monotonic()
        try:
            with watched() as acts:
                read(source)
        except ExportError as error:
            counts[kind][1] += 1
            assert_a_sentence(str(error))
        except BaseException as error:
            raise AssertionError(f"seed {seed}, input {number}: {name} with damage to its {kind}") from error
        assert acts == [], (seed, number)
        counts[kind][0] += 1
        slowest = max(slowest, time.monotonic() - started)
        shutil.rmtree(source)
    return counts, slowest, peak() - before


@pytest.mark.parametrize(("count", "seed"), [(600, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)])
def test_damaged_sources_are_read_or_refused_with_a_sentence(
    count: int, seed: int, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    started = time.monotonic()
    counts, slowest, grown = fuzz(tmp_path, count, seed)
    tried, refused = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    tell(
        f"fuzzed sources: {tried} inputs, {refused} refused ("
        + ", ".join(f"{kind} {refused} of {tried}" for kind, (tried, refused) in counts.items())
        + f"), {time.monotonic() - started:.0f} s, the slowest {slowest:.1f} s, memory grew by {grown >> 20} MiB"
    )
    assert tried == count
    assert all(0 < refused <= tried for tried, refused in counts.values())
    assert slowest < MOST_SECONDS
    assert grown < MOST_MEMORY
