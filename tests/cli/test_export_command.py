"""The command as its user sees it: the example without a flag about models, the table, dry runs, shards, exclusions."""

import json
from pathlib import Path

import pytest
import torch

from ..export.test_topologies import calibration_flags, export
from ..support.models import EXAMPLE, assert_same, read_json, tensors
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

SHORT = ("--calib-samples", 2, "--calib-seq-len", 32)


def test_the_example_model_is_exported_with_its_tokenizer_and_a_table(ranks: Ranks, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    said = export(ranks, 2, *SHORT, "--tp", 2, "--format", "nvfp4", "--kv-cache", "fp8", "--output", out)
    total = sum(tensor.nbytes for tensor in tensors(out).values())
    for line in (
        "format            nvfp4, KV cache fp8",
        "modules           28 quantized, 2 left in bfloat16: lm_head, model.embed_tokens",
        f"written           {total:,} bytes in 1 file",
        f"folder            {out}",
    ):
        assert line in said.splitlines()
    assert {"seconds", "peak", "read", "compression"} <= {line.split()[0] for line in said.splitlines()}
    ours, theirs = (AutoTokenizer.from_pretrained(place)("x = 1")["input_ids"] for place in (out, EXAMPLE))
    assert ours == theirs
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    made = {"model.safetensors", "config.json", "hf_quant_config.json", "export_manifest.json"}
    assert {path.name for path in out.iterdir()} == copied | made
    for name in copied:
        assert (out / name).read_bytes() == (EXAMPLE / name).read_bytes()


def test_a_dry_run_needs_no_weights_and_writes_nothing(ranks: Ranks, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((EXAMPLE / "config.json").read_bytes())
    flags = ("--dry-run", "--format", "bf16", "--hf-model", source, "--output", tmp_path / "out")
    said = export(ranks, 4, "--tp", 4, *flags)
    assert "written           10,491,392 bytes in 1 file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_dry_run_tells_what_the_export_then_writes(ranks: Ranks, tmp_path: Path) -> None:
    flags = (*SHORT, "--tp", 2, "--max-shard-size", "2MB", "--exclude", "*.mlp.*")
    dry = export(ranks, 2, *flags, "--dry-run").splitlines()
    real = export(ranks, 2, *flags, "--output", tmp_path / "out").splitlines()
    assert [line.split("  ")[0] for line in real if line in dry] == [
        "format", "modules", "gathered first", "written", "compression", "vLLM", "SGLang", "TensorRT-LLM",
        "peak GPU memory"
    ]  # fmt: skip
    nbytes = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert any(line.startswith("on disk") and f"{nbytes:,} bytes" in line for line in dry)


def test_shards_have_an_index_and_hold_what_one_file_holds(ranks: Ranks, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    saved = tmp_path / "c.safetensors"
    export(ranks, 1, *SHORT, "--save-calibration", saved, "--output", one)
    export(ranks, 1, "--load-calibration", saved, "--max-shard-size", "1500KB", "--output", many)
    assert_same(tensors(one), tensors(many))
    index = read_json(many / "model.safetensors.index.json")
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files == [f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)]
    assert len(files) >= 4
    assert max((many / file).stat().st_size for file in files) < 1_600_000  # 1,500,000 of tensors, and the header
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(many).values())
    assert not (one / "model.safetensors.index.json").exists()


def test_excluded_modules_stay_as_they_were(ranks: Ranks, models: dict, tmp_path: Path) -> None:
    source = models["llama31"]
    export(ranks, 2, "--tp", 2, "--hf-model", source, *calibration_flags(source), "--exclude", "model.layers.0.*", "*.o_proj",
        "--output", tmp_path / "out")  # fmt: skip
    found, original = tensors(tmp_path / "out"), tensors(source)
    left = {name for name in original if name.startswith("model.layers.0.") or "o_proj" in name}
    assert_same({name: found[name] for name in left}, {name: original[name] for name in left})
    assert not [name for name in found if name.rpartition(".")[0] + ".weight" in left and name not in left]
    ignored = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
    linears = {name.removesuffix(".weight") for name in left if "_proj" in name}
    assert set(ignored) == linears | {"lm_head", "model.embed_tokens"}
    assert read_json(tmp_path / "out" / "hf_quant_config.json")["quantization"]["exclude_modules"] == ignored


def test_overwrite_replaces_the_old_checkpoint_whole(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ranks, 1, "--format", "bf16", "--max-shard-size", "3MB", "--output", out)
    (out / "notes.txt").write_text("old")
    export(ranks, 2, "--format", "bf16", "--tp", 2, "--overwrite", "--output", out)
    assert_same(tensors(out), tensors(EXAMPLE))
    assert not (out / "notes.txt").exists()
    assert not (out / "model.safetensors.index.json").exists()
    assert json.loads((out / "config.json").read_text()) == read_json(EXAMPLE / "config.json")


def test_an_output_behind_a_link_is_written_where_the_link_points(ranks: Ranks, tmp_path: Path) -> None:
    real = tmp_path / "disk" / "out"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    export(ranks, 1, "--format", "bf16", "--output", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(tensors(real), tensors(EXAMPLE))


def test_a_float32_source_is_written_as_bfloat16(ranks: Ranks, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "source"
    source.mkdir()
    wide = {name: tensor.float() + 2**-14 * tensor.float() for name, tensor in tensors(EXAMPLE).items()}
    save_file(wide, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(read_json(EXAMPLE / "config.json") | {"torch_dtype": "float32"}))
    export(ranks, 2, "--tp", 2, "--format", "bf16", "--hf-model", source, "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), {name: tensor.to(torch.bfloat16) for name, tensor in wide.items()})
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "bfloat16"
