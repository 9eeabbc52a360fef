"""What others may have put into a model's folder, a calibration file or statistics to do harm: each is refused by name, nothing
outside the folder is read, nothing is run, and memory stays small.
"""

import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from megatron_export.calibration.data import read_samples
from megatron_export.calibration.statistics import KIND, check_kind, load, save, sizes_of
from megatron_export.checkpoint import hf_folder
from megatron_export.checkpoint.hf_weights import SourceWeights
from megatron_export.common.errors import ExportError
from megatron_export.common.file_names import INDEX
from megatron_export.common.safe_files import MOST_BYTES, MOST_FILES, MOST_VALUES
from megatron_export.models import architecture_of, parameters_of, rope_of, settings_of
from megatron_export.models.hf_config_limits import MOST_LAYERS
from megatron_export.models.sources import MOST_NUMBERS, MOST_PARAMETERS

from ..calibration.test_statistics import CONFIG, HF, rewritten, statistics_of
from ..support.command_line import python
from ..support.configs import DEEPSEEK_V3, LLAMA_70B
from ..support.models import ARCHITECTURES, EXAMPLE, read_json
from .test_damaged_folders import FILES, NAMES, SMALL, make_folder, read, watched

SINGLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in two files with an index; beside it a secret that nobody asked for."""
    (tmp_path / "secret").write_text('{"secret": 1}')
    make_folder(tmp_path / "model", "llama31")
    return tmp_path / "model"


def refusal(call: Callable, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(ExportError) as refused, watched() as acts:
        call(*arguments, **settings)
    assert acts == []
    return str(refused.value)


def reindexed(folder: Path, change: Callable[[dict], object]) -> None:
    homes = read_json(folder / INDEX)["weight_map"]
    change(homes)
    (folder / INDEX).write_text(json.dumps({"weight_map": homes}))


def write_safetensors(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: tuple[int, ...] = (2,), start: int = 0, end: int = 8, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# Names and links.


@pytest.mark.parametrize(
    "name",
    [
        "../model/model-00001-of-00002.safetensors",
        "..\\x.safetensors",
        "/etc/x.safetensors",
        "./model-00001-of-00002.safetensors",
        "deep/x.safetensors",
        "x\0.safetensors",
        "\x1b[2Jx.safetensors",
        "x" * 300 + ".safetensors",
    ],
)
def test_a_file_outside_the_folder_is_not_read(name: str, folder: Path) -> None:
    reindexed(folder, lambda homes: homes.update({next(iter(homes)): name}))
    said = refusal(SourceWeights, folder)
    assert said.startswith(f"{folder}: ")
    assert "is not the name of a file in this folder. Fetch the checkpoint again" in said


@pytest.mark.parametrize("name", ["", ".", "..", "pytorch_model.bin", None, 3, True, ["a.safetensors"], {}])
def test_what_is_not_the_name_of_a_safetensors_file_is_refused(name: object, folder: Path) -> None:
    reindexed(folder, lambda homes: homes.update({next(iter(homes)): name}))
    said = refusal(SourceWeights, folder)
    assert said == f"{folder / INDEX}: not the index of a checkpoint ({name!r} is no safetensors file). Fetch it again"


@pytest.mark.parametrize("name", ["", "x" * 600, "a\nb", "\x1b[31m"])
def test_the_name_of_a_tensor_must_be_one(name: str, folder: Path) -> None:
    reindexed(folder, lambda homes: homes.update({name: FILES[0]}))
    assert "is no name of a tensor" in refusal(SourceWeights, folder)
    write_safetensors(folder / "own.safetensors", {name: entry()}, bytes(8))
    reindexed(folder, lambda homes: homes.clear() or homes.update({"a": "own.safetensors"}))
    assert f"{folder / 'own.safetensors'}: not a readable safetensors file (" in refusal(SourceWeights, folder)


@pytest.mark.parametrize("way", ["../secret", "{}/secret", "../link"])
@pytest.mark.parametrize("name", [FILES[1], INDEX, "config.json", "tokenizer.json", "LICENSE", "own.py"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, way: str, folder: Path) -> None:
    (folder.parent / "link").symlink_to("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(way.format(folder.parent))
    said = f"{folder / name} is a symbolic link out of its folder, which is not followed. Put the file"
    assert refusal(read, folder).startswith(said)


def test_a_link_within_the_folder_and_a_link_to_the_folder_are_followed(folder: Path) -> None:
    for name in (FILES[0], "config.json", "tokenizer.json"):
        (folder / name).rename(folder / f"{name}.real")
        (folder / name).symlink_to(f"{name}.real")
    (folder.parent / "here").symlink_to("model")
    read(folder)
    read(folder.parent / "here")


def cached(folder: Path, cache: Path) -> Path:
    """The folder as the hub's cache keeps it: every file a link to what it is called by its content."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, repository / "blobs" / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


def test_a_snapshot_in_the_hubs_cache_is_read_and_copied_from(folder: Path, tmp_path: Path) -> None:
    snapshot = cached(folder, tmp_path / "cache")
    read(snapshot)
    assert hf_folder.files_to_copy(snapshot) == [snapshot / "tokenizer.json"]
    assert hf_folder.files_to_copy(snapshot)[0].read_text() == "{}"


def test_blobs_that_the_hubs_cache_shares_between_models_are_read(folder: Path, tmp_path: Path) -> None:
    snapshot = cached(folder, tmp_path / "cache")
    blob = Path(os.path.realpath(snapshot / FILES[0]))
    shared = tmp_path / "cache" / "blobs" / blob.name[:2] / blob.name
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/{blob.name[:2]}/{blob.name}")
    read(snapshot)


@pytest.mark.parametrize("way", ["../../../../secret", "../../../models--org--other/blobs/x", "../../refs", "../abd/x"])
def test_a_snapshot_links_to_nothing_but_its_blobs(way: str, folder: Path, tmp_path: Path) -> None:
    snapshot = cached(folder, tmp_path / "cache")
    target = snapshot / way
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "tokenizer.json", target)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(way)
    assert "tokenizer.json is a symbolic link out of its folder" in refusal(
        hf_folder.find_model, snapshot, weights=True
    )


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / FILES[0]).unlink()
    os.mkfifo(folder / FILES[0])
    assert refusal(SourceWeights, folder) == f"{folder / FILES[0]} is not a file. Fetch the checkpoint again"


# Pickles.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.PT", "model.pkl"])
def test_a_folder_of_pickles_is_refused_and_none_is_opened(name: str, folder: Path) -> None:
    for file in (*FILES, INDEX):
        (folder / file).unlink()
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    for call in (lambda: hf_folder.find_model(folder, weights=True), lambda: SourceWeights(folder)):
        said = refusal(call)
        assert f"{folder}: no weights but in {name}, a pickle" in said
        assert "Convert it to safetensors where you trust it" in said


@pytest.mark.parametrize("name", ["vocab.pkl", "vocab.bin", "LICENSE.pt", "chat_template.safetensors", "NOTICE.BIN"])
def test_pickles_and_other_weights_are_not_copied_whatever_they_are_called(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"\x80\x04.")
    (folder / "vocab.txt").write_text("a")
    assert [path.name for path in hf_folder.files_to_copy(folder)] == ["tokenizer.json", "vocab.txt"]


def test_no_module_of_the_package_unpickles() -> None:
    """But `safe_pickle.py`, with a reader of its own that calls nothing, and a process that its own parent tells what to do."""
    known = {
        "safe_pickle.py": ["_Stop", "_Unframer", "_Unpickler"],
        "async_start.py": ["dump"],
        "async_writer.py": ["load"],
    }
    for path in Path(hf_folder.__file__).parents[1].rglob("*.py"):
        text, own = path.read_text(), path.name in known
        named = {name for name in re.findall(r"\bpickle\.(\w+)", text) if not name.isupper()}  # steps of the program
        assert sorted(named) == known.get(path.name, []), path
        assert not re.search(r"torch\.load\(|joblib|np\.load" + ("" if own else "|import pickle"), text), path


# Index and headers.


def twice(text: bytes) -> bytes:
    """JSON with its first key once more at the end."""
    first = text[1 : text.index(b":")]
    return text.rstrip()[:-1] + b"," + first + b": {}}"


@pytest.mark.parametrize("name", [INDEX, FILES[0], "config.json"])
def test_a_key_that_is_there_twice_is_refused(name: str, folder: Path) -> None:
    text = (folder / name).read_bytes()
    if name == FILES[0]:
        length = int.from_bytes(text[:8], "little")
        header = twice(text[8 : 8 + length])
        (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + text[8 + length :])
    else:
        (folder / name).write_bytes(twice(text))
    said = refusal(read, folder)
    assert said.startswith(f"{folder / name}: not ")
    assert re.search(r"the key '.*' is there twice\)\. Fetch (it|this file) again$", said)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    held = {"model.norm.weight": torch.ones(32), "model.layers.0.self_attn.q_proj.weight": torch.ones(64, 32)}
    reindexed(folder, lambda homes: homes.update({"model.norm.weight": "own.safetensors"}))
    save_file(held, folder / "own.safetensors")
    said = refusal(SourceWeights, folder)
    assert re.fullmatch(rf"{folder}: tensor \S+ is in {FILES[0][:8]}\S+ and in own.safetensors. Fetch both again", said)


HEADERS: dict[str, tuple[tuple, str]] = {  # what is written, and what is said of it
    "overlapping": (({"a": entry(), "b": entry()}, bytes(8)), "invalid offset"),
    "beyond the file": (({"a": entry((2**32,), 0, 2**34)}, bytes(8)), "not fully covered"),
    "backwards": (({"a": entry(start=8, end=0)}, bytes(8)), "invalid offset"),
    "with a hole": (({"a": entry(start=4, end=12)}, bytes(12)), "invalid offset"),
    "negative": (({"a": entry((-2,))}, bytes(8)), "integer `-2`"),
    "overflowing": (({"a": entry((2**33, 2**33))}, bytes(8)), "overflow"),
    "of no numbers, too many of them": (({"a": entry((0, 2**63), 0, 0)},), "9223372036854775808"),
    "of another size": (({"a": entry((3,))}, bytes(8)), "invalid shape, data type, or offset"),
    "of an unknown type": (({"a": entry(dtype="\x1b[2J")}, bytes(8)), "unknown variant `\\x1b[2J`"),
    "half numbers": (({"a": entry((1.5,))}, bytes(8)), "floating point `1.5`"),
    "longer than the file": (({"a": entry()}, bytes(8), 2**63), "header would have 9,223,372,036,854,775,808 bytes"),
    "one byte longer": (({"a": entry()}, b"", len(json.dumps({"a": entry()})) + 1), "header would have"),
    "a list": ((b"[1, 2]",), "no table of tensors"),
    "deep": ((b"[" * 100_000 + b"]" * 100_000,), "levels deep"),
    "of many values": ((b'{"a":[' + b"1," * MOST_VALUES + b"1]}",), "more than 1,000,000 values"),
    "not UTF-8": ((b'{"\xff": 1}',), "not in UTF-8 from byte 2 on"),
    "nothing": ((b"", b"", 0), "Expecting value"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(case: str, folder: Path) -> None:
    written, words = HEADERS[case]
    (folder / INDEX).unlink()
    write_safetensors(folder / SINGLE, *written)
    said = refusal(SourceWeights, folder)
    assert said.startswith(f"{folder / SINGLE}: not a readable safetensors file (")
    assert words in said
    assert said.endswith("). Fetch this file again")


@pytest.mark.parametrize("length", [MOST_BYTES + 1, 10**8, 10**9])
def test_a_header_of_absurd_size_is_not_read(length: int, folder: Path) -> None:
    (folder / INDEX).unlink()
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(length + 100)  # on disk it takes no room
    started = time.monotonic()
    assert f"(its header has {length:,} bytes, more than {MOST_BYTES:,})" in refusal(SourceWeights, folder)
    assert time.monotonic() - started < 1


def test_an_index_of_very_many_files_is_refused(folder: Path) -> None:
    reindexed(folder, lambda homes: homes.update({f"t{n}": f"{n}.safetensors" for n in range(MOST_FILES)}))
    assert f"it names {MOST_FILES + 2:,} files, more than {MOST_FILES:,}" in refusal(SourceWeights, folder)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "BOOL", "F64", "F4", "C64"])
def test_numbers_of_a_type_that_no_model_is_trained_in_are_refused(dtype: str, folder: Path) -> None:
    text = (folder / FILES[0]).read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    name = next(name for name in header if name.endswith("norm.weight"))
    start, end = header[name]["data_offsets"]
    bits = {"F64": 64, "C64": 64, "F4": 4}.get(dtype, 8)
    header[name] |= {"dtype": dtype, "shape": [(end - start) * 8 // bits]}
    write_safetensors(folder / FILES[0], header, text[8 + length :])
    assert f"{folder}: tensor {name} is {dtype}, not one of BF16, F16, F32" in refusal(read, folder)


def test_a_scale_beside_a_weight_that_is_not_in_float8_is_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    save_file({name: torch.ones(1, 1)}, folder / "own.safetensors")
    reindexed(folder, lambda homes: homes.update({name: "own.safetensors"}))
    assert f"tensor {name} is not part of this architecture" in refusal(read, folder)


BIG_TEXTS = {  # JSON that is small on disk and large in memory, or the reverse
    "lists": b"[" + b"[]," * (MOST_VALUES // 2 - 10) + b"1]",
    "tables": b"[" + b'{"a":1},' * (MOST_VALUES // 2 - 10) + b"1]",
    "keys": b"{" + b",".join(b'"%d":%d' % (n, n + 10**9) for n in range(MOST_VALUES - 10)) + b"}",
    "letters": b'["' + "\U0001f600".encode() + b"x" * (MOST_BYTES - 100) + b'"]',
    "more lists": b"[" + b"[]," * 10_000_000 + b"1]",
    "brackets": b"[" * 10_000_000,
    "nothing": bytes(MOST_BYTES),
}
MEASURE = """
import resource, sys
from pathlib import Path
from megatron_export.common.safe_files import read_json
read_json.__module__
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_json(Path(path))
    except ValueError:
        pass
assert "torch" not in sys.modules
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_no_json_takes_more_than_a_few_hundred_megabytes_to_read(tmp_path: Path) -> None:
    for name, text in BIG_TEXTS.items():
        (tmp_path / name).write_bytes(text)
    done = python("-c", MEASURE, *(tmp_path / name for name in BIG_TEXTS))
    assert int(done.stdout) < 400, done.stderr


# config.json.


def read_settings(config: dict) -> None:
    architecture_of(config)
    settings_of(config)
    rope_of(config)
    parameters_of(config)


def config_of(name: str, **changes: Any) -> dict:
    return {"architectures": [NAMES[name]], **SMALL, "mlp_only_layers": [], **ARCHITECTURES[name], **changes}


BYTES = {
    "a byte order mark": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "another encoding": ('{"a": "é"}'.encode("latin1"), "not in UTF-8 from byte 7 on"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not in UTF-8 from byte 0 on"),
    "deep": (b'{"a":' * 100_000, "levels deep"),
    "deep, and complete": (b'{"a":' * 100 + b"1" + b"}" * 100, "more than 50 levels deep"),
    "a number beyond all": (b'{"rope_theta": 1e999}', "no finite number"),
    "very many digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "4300 digits"),
    "half a character": (b'{"a": "\\ud800"}', "surrogates not allowed"),
    "zeros": (bytes(1000), "Expecting value"),
}


@pytest.mark.parametrize("case", BYTES)
def test_a_config_that_is_not_plain_json_is_refused(case: str, tmp_path: Path) -> None:
    text, words = BYTES[case]
    (tmp_path / "config.json").write_bytes(text)
    said = refusal(hf_folder.read_config, tmp_path)
    assert said.startswith(f"{tmp_path / 'config.json'}: not JSON (")
    assert words in said
    assert said.endswith("). Fetch it again")


def test_an_endless_config_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**11)
    started = time.monotonic()
    assert f"more than {MOST_BYTES:,} bytes" in refusal(hf_folder.read_config, tmp_path)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("value", ["fp8", ["fp8"], True, 3])
def test_a_description_of_quantization_that_is_none_is_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": value}))
    assert f"quantization_config is {value!r}, not a table of settings" in refusal(hf_folder.read_config, tmp_path)


WHOLE, ABOVE, COUNT = "not a whole number above 0", "not a number above 0", "not a whole number of at least 0"
MANY, WIDE, FEW = f"more than {MOST_LAYERS:,}", "more than 16,777,216", "there are not as many"
TABLE, NAMED, LAYERS = "not a table of settings", "not a list of names", "not a list of layers"
KINDS = "not a kind for each of num_hidden_layers 4"
# Model -> key -> what is said of it -> values that it cannot have.
IMPOSSIBLE: dict[str, dict[str, dict[str, list]]] = {
    "llama31": {
        "num_hidden_layers": {MANY: [10**9, MOST_LAYERS + 1, 10**4000], WHOLE: [-4, True, 4.0, {"a": 4}]},
        "hidden_size": {WHOLE: [0, [64]], WIDE: [1 << 60]},
        "vocab_size": {WHOLE: [math.inf, math.nan]},
        "num_key_value_heads": {WHOLE: [-1]},
        "head_dim": {WHOLE: ["8"]},
        "rms_norm_eps": {f"{ABOVE} and up to 1": ["1e-6"], ABOVE: [math.nan, 0]},
        "rope_theta": {ABOVE: [-1.0, False, math.inf, -math.inf], f"{ABOVE} and up to 1e+30": [10**4000]},
        "rope_scaling": {
            TABLE: [[1]],
            "rope_scaling.rope_type is 3, not a name": [{"rope_type": 3}],
            "rope_scaling.factor is inf": [{"rope_type": "llama3", "factor": math.inf}],
            "lacks factor": [{"rope_type": "linear"}],
        },
        "tie_word_embeddings": {"not true or false": ["no"]},
        "text_config": {TABLE: [[], None]},
        "architectures": {
            NAMED: ["LlamaForCausalLM", [["LlamaForCausalLM"]], {"a": 1}],
            "unknown architecture": [["x" * 10**6]],
        },
        "attention_bias": {"is not supported": [{"a": 1}]},
    },
    "qwen2_yarn": {"rope_scaling": {"rope_scaling.factor is {}": [{"rope_type": "yarn", "factor": {}}]}},
    "qwen3_moe": {
        "num_experts": {
            WIDE: [10**9],
            f"parameters in 4 layers of {MOST_PARAMETERS} experts, more than": [MOST_PARAMETERS],
        },
        "num_experts_per_tok": {FEW: [5], "lacks num_experts_per_tok": [0]},
        "mlp_only_layers": {f"{LAYERS} below num_hidden_layers 4": [[4]], LAYERS: [[-1], [True], [0] * 5]},
        "decoder_sparse_step": {WHOLE: [0]},
        "moe_intermediate_size": {WHOLE: [-48]},
    },
    "deepseek_v3": {
        "rope_scaling": {"lacks factor": [{"rope_type": "yarn"}]},
        "first_k_dense_replace": {"is more than num_hidden_layers 4": [5], COUNT: [-1]},
        "num_nextn_predict_layers": {MANY: [10**9]},
        "n_group": {FEW: [3]},
        "topk_group": {"lacks topk_group": [0]},
        "v_head_dim": {"lacks v_head_dim": [None]},
        "kv_lora_rank": {COUNT: ["32"]},
        "norm_topk_prob": {"norm_topk_prob = None is not supported": [None]},
    },
    "llama4": {
        "moe_layers": {LAYERS: [[0, 99], "all"]},
        "no_rope_layers": {
            "no_rope_layers names 3 layers, num_hidden_layers is 4": [[1, 1, 1]],
            "not a list of 0 and 1": [[1, 1, 1, 2]],
        },
        "interleave_moe_layer_step": {WHOLE: [0]},
    },
    "gpt_oss": {
        "layer_types": {
            KINDS: [["full_attention"], [0, 1, 0, 1]],
            "not 'full_attention' or 'sliding_attention'": [["full_attention"] * 3 + ["other"]],
        },
        "sliding_window": {COUNT: [-5]},
        "swiglu_limit": {ABOVE: [-7]},
    },
}


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        (name, key, value, words)
        for name, keys in IMPOSSIBLE.items()
        for key, said in keys.items()
        for words, values in said.items()
        for value in values
    ],
)
def test_a_value_that_cannot_be_is_refused_at_once(name: str, key: str, value: object, words: str) -> None:
    read_settings(config_of(name, num_hidden_layers=4))
    started = time.monotonic()
    said = refusal(read_settings, config_of(name, **{"num_hidden_layers": 4, key: value}))
    assert time.monotonic() - started < 2
    assert words in said
    assert "config.json" in said
    assert len(said) < 500


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "num_attention_heads"])
def test_a_tensor_larger_than_any_is_refused_before_it_is_planned(key: str) -> None:
    config = config_of("llama31", hidden_size=1 << 20, num_key_value_heads=1, **{"head_dim": 1024, key: 1 << 20})
    assert f"more than {MOST_NUMBERS:,}. Give the config.json that belongs" in refusal(read_settings, config)


def test_several_wrong_values_are_told_together() -> None:
    said = refusal(read_settings, config_of("llama31", hidden_size=-1, vocab_size="x", rope_theta=0))
    assert said.startswith("3 problems:")


def test_the_largest_models_that_are_known_are_within_the_limits() -> None:
    kimi_k2 = DEEPSEEK_V3 | {"num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384}
    kimi_k2 |= {
        "n_group": 1,
        "topk_group": 1,
        "vocab_size": 163840,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": 1,
    }
    kimi_k2["rope_scaling"] = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "mscale": 1.0}
    assert 2 * len(parameters_of(config_of("deepseek_v3", **kimi_k2))) < MOST_PARAMETERS
    llama_405b = LLAMA_70B | {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128}
    llama_405b |= {"head_dim": 128, "intermediate_size": 53248}
    assert len(parameters_of(config_of("llama31", **llama_405b))) == 126 * 6 + 3


# Calibration data.


def text_file(folder: Path, suffix: str, content: str | bytes) -> Path:
    (folder / f"data{suffix}").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / f"data{suffix}"


ROWS = {
    "deep": ('{"text": ' + "[" * 100_000, "RecursionError"),
    "a number of very many digits": ('{"text": ' + "9" * 5000 + "}", "4300 digits"),
    "half a character": ('{"text": "\\ud800"}', "surrogates not allowed"),
    "not UTF-8": (b'{"text": "\xff"}', "not in UTF-8 from byte 10 on"),
    "endless": ('{"text": "' + "x" * (17 << 20), "a row of more than 16,777,216 letters"),
    "endless, and nothing": ("\n" + " " * (17 << 20), "a row of more than 16,777,216 letters"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_hostile_row_of_text_is_refused(case: str, tmp_path: Path) -> None:
    content, words = ROWS[case]
    file = text_file(tmp_path, ".jsonl", content)
    said = refusal(read_samples, file, EXAMPLE, samples=1, length=8)
    assert said.startswith(f"{file}: not .jsonl with a `text` in every row (")
    assert words in said


def test_a_long_line_is_read_in_pieces_and_gives_the_tokens_of_its_text(tmp_path: Path) -> None:
    file = text_file(tmp_path, ".txt", "abc " * 3_000_000)
    samples = read_samples(file, EXAMPLE, samples=1, length=4000)
    short = read_samples(
        text_file(tmp_path, ".jsonl", '{"text": "' + "abc " * 4000 + '"}'), EXAMPLE, samples=1, length=4000
    )
    assert torch.equal(samples, short)


def test_a_row_that_a_parquet_file_repeats_is_not_unfolded(tmp_path: Path) -> None:
    """Four megabytes of letters, 300 times: dense, they would be 1.2 GB."""
    texts = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 300, pyarrow.int32()), pyarrow.array(["ab " * (1 << 20)])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "data.parquet")
    before = pyarrow.default_memory_pool().max_memory()
    assert read_samples(tmp_path / "data.parquet", EXAMPLE, samples=1, length=512).shape == (1, 512)
    assert pyarrow.default_memory_pool().max_memory() - before < 100 << 20


def test_a_row_beyond_all_is_refused_in_parquet_too(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * (17 << 20)]}), tmp_path / "data.parquet")
    said = refusal(read_samples, tmp_path / "data.parquet", EXAMPLE, samples=1, length=8)
    assert "a row of more than 16,777,216 letters" in said


IDS = {
    "twice": (
        (b'{"input_ids":%s,"input_ids":%s}' % ((json.dumps(entry((2, 1), dtype="I32")).encode(),) * 2), bytes(8)),
        "twice",
    ),
    "truth": (({"input_ids": entry((2, 4), dtype="BOOL")}, bytes(8)), "needs an integer tensor `input_ids`"),
    "floats": (({"input_ids": entry((2, 4), dtype="F8_E4M3")}, bytes(8)), "needs an integer tensor `input_ids`"),
    "a shape that is none": (({"input_ids": entry((2, -4), dtype="U8")}, bytes(8)), "not a readable safetensors file"),
    "overlapping": (({"input_ids": entry((2, 1)), "b": entry()}, bytes(8)), "not a readable safetensors file"),
    "of nothing": (({},), "it holds none"),
}


@pytest.mark.parametrize("case", IDS)
def test_hostile_token_ids_are_refused(case: str, tmp_path: Path) -> None:
    written, words = IDS[case]
    write_safetensors(tmp_path / "ids.safetensors", *written)
    said = refusal(read_samples, tmp_path / "ids.safetensors", EXAMPLE, samples=2, length=8)
    assert said.startswith(f"{tmp_path / 'ids.safetensors'}: ")
    assert words in said


def test_of_token_ids_only_those_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """Beside them are 2 GB of another tensor, and rows of ids that nobody asked for; on disk they take no room."""
    rows, others = 1_000_000, 2 * 10**9
    header = {
        "a": entry((others,), 0, others, "U8"),
        "input_ids": entry((rows, 1000), others, others + rows * 1000, "U8"),
    }
    file = tmp_path / "ids.safetensors"
    write_safetensors(file, header)
    os.truncate(file, file.stat().st_size + others + rows * 1000)
    samples = read_samples(file, EXAMPLE, samples=3, length=8)
    assert samples.shape == (3, 1000)
    assert samples.dtype == torch.int64
    said = refusal(read_samples, file, EXAMPLE, samples=rows, length=8)
    assert "--calib-samples 1000000 of 1,000 tokens are more than 67,108,864 tokens. Ask for fewer" in said


# Statistics.


STATISTICS = {
    "no JSON": ("{", "the sizes of the model it was measured on are not readable (Expecting"),
    "deep": ("[" * 1000 + "]" * 1000, "levels deep"),
    "a list": ("[1]", "are not readable (they are [1])"),
    "null": ("null", "are not readable (they are None)"),
    "twice": ('{"layers": 2, "layers": 2}', "the key 'layers' is there twice"),
    "of a name that is none": ('{"\\u001b[2J": 1}', "measured on another model"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_that_say_nonsense_of_their_model_are_refused(case: str, tmp_path: Path) -> None:
    text, words = STATISTICS[case]
    save_file({"a": torch.ones(1)}, tmp_path / "file", metadata={KIND: text})
    said = refusal(load, tmp_path / "file", CONFIG)
    assert f"{tmp_path / 'file'}: " in said
    assert words in said
    assert "\x1b" not in said


def test_statistics_of_absurd_sizes_are_refused_and_not_read(tmp_path: Path) -> None:
    save(statistics_of("nvfp4"), tmp_path / "file", CONFIG)
    name = f"{HF}.mlp.down_proj.input_channel_amax"
    rewritten(tmp_path / "file", lambda held: held.update({name: torch.zeros(100_000, dtype=torch.uint8)}))
    said = refusal(load, tmp_path / "file", CONFIG)
    assert said.startswith(
        f"{tmp_path / 'file'}: {name} is U8 [100000], which no statistic of this model is. Write it again"
    )
    rewritten(tmp_path / "file", lambda held: held.update({name: torch.ones(256, dtype=torch.complex64)}))
    assert f"{name} is C64 [256], which no statistic" in refusal(load, tmp_path / "file", CONFIG)


def test_what_kind_of_file_it_is_is_told_from_its_header(tmp_path: Path) -> None:
    size = 4 * 10**9
    header = {"__metadata__": {KIND: json.dumps(sizes_of(CONFIG))}, "a": entry((size,), 0, size, "U8")}
    write_safetensors(tmp_path / "file", header)
    os.truncate(tmp_path / "file", (tmp_path / "file").stat().st_size + size)
    check_kind(tmp_path / "file")
    assert "is missing" in refusal(load, tmp_path / "file", CONFIG)


# Tokenizers.


OWN = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).write_text("ran")
class Own(PreTrainedTokenizerFast):
    pass
"""


def with_own_tokenizer(folder: Path, marker: Path) -> Path:
    """A model whose tokenizer is Python code, which leaves a mark when it runs."""
    shutil.copytree(EXAMPLE, folder)
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | {"model_type": "own"}))
    changes = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(read_json(folder / "tokenizer_config.json") | changes))
    (folder / "own.py").write_text(OWN.format(marker=str(marker)))
    return folder


def test_code_of_a_tokenizer_runs_only_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = with_own_tokenizer(tmp_path / "model", tmp_path / "mark")
    text = EXAMPLE / "calibration.txt"
    said = refusal(read_samples, text, model, samples=2, length=16)
    assert said.startswith(
        f"{model}: its tokenizer is Python code of its own, which is not run unless you say so. Read that"
    )
    assert "give --trust-remote-code, or give --calib-data token ids" in said
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "modules").exists()
    found = read_samples(text, model, samples=2, length=16, trust_remote_code=True)
    assert (tmp_path / "mark").read_text() == "ran"
    assert torch.equal(found, read_samples(text, EXAMPLE, samples=2, length=16))


def test_a_tokenizer_that_fails_on_a_text_is_told(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "model")
    model = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "none", "continuing_subword_prefix": "#"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model | {"max_input_chars_per_word": 9}}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    file = text_file(tmp_path, ".txt", "bbbb bbbb")
    said = refusal(read_samples, file, tmp_path / "model", samples=1, length=2)
    assert said.startswith(f"{tmp_path / 'model'}: its tokenizer fails on the text of {file} (")
