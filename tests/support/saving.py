"""Checkpoints as Megatron-Core itself saves them: small ones, of models that are built here, with what training leaves beside."""

import argparse
import pickle
import queue
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.enums import AttnBackend
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_export import calibrate, export_hf_checkpoint, save_calibration
from megatron_export.common.errors import ExportError
from megatron_export.mcore.cpu_compat import without_cuda
from megatron_export.models import rope_of, settings_of, shape_of, unscaled_rope_settings
from megatron_export.models.hf_config import text_of

from .live import batches, loaded
from .models import read_json

ITERATION = 7
PLACE = f"iter_{ITERATION:07d}"


class _Process:
    """Runs where it is started: the ranks of a test may have no children."""

    def __init__(self, target: Callable, kwargs: dict) -> None:
        self.start = lambda: target(**kwargs)

    def join(self) -> None:
        pass


_PROCESSES = SimpleNamespace(Queue=queue.Queue, JoinableQueue=queue.Queue, Process=_Process, Manager=lambda: _PROCESSES)


def arguments(config: dict) -> argparse.Namespace:
    """What Megatron-LM's arguments would be for a model of config.json's dict; some that no reader knows too."""
    names = {"layernorm_epsilon": "norm_epsilon", "num_moe_experts": "num_experts"}
    settings = settings_of(config) | unscaled_rope_settings(config)
    activation, gated = settings.pop("activation_func"), settings.pop("gated_linear_unit")
    said = {names.get(name, name): value for name, value in settings.items()}
    return argparse.Namespace(
        **said | _scaled(config),
        swiglu=gated and activation != "quick_gelu",  # and for Gemma's, which has no argument of its own
        quick_geglu=activation == "quick_gelu",
        squared_relu=activation == "squared_relu",
        group_query_attention=True,
        vocab_size=text_of(config)["vocab_size"],
        max_position_embeddings=text_of(config).get("max_position_embeddings"),
        untie_embeddings_and_output_weights=not shape_of(config).tied,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        tokenizer_model=Path("/somewhere"),
    )


def _scaled(config: dict) -> dict[str, Any]:
    """The arguments for how rotations are scaled, but for those of latent attention."""
    try:
        rope = rope_of(config)
    except ExportError:  # which Megatron does not compute
        return {}
    if rope.llama3:
        return {"use_rope_scaling": True, "rope_scaling_factor": rope.llama3["factor"]}
    linear = {"rotary_seq_len_interpolation_factor": rope.arguments.get("seq_len_interpolation_factor")}
    return rope.yarn | ({"position_embedding_type": "yarn"} if rope.yarn else {}) | linear


def save(
    model: nn.Module | list[nn.Module],
    folder: Path,
    config: dict,
    *,
    optimizer: bool = False,
    metadata: dict | None = None,
    args: dict | None = None,
) -> None:
    """On every rank of a world: save a model as Megatron-LM does, as iteration 7 of `folder`; `args` are arguments that differ."""
    chunks = model if isinstance(model, list) else [model]
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    said = argparse.Namespace(**vars(arguments(config)) | (args or {}))
    metadata = {"dp_cp_group": group} | (metadata or {})
    state: dict[str, Any] = {"args": said, "checkpoint_version": 3.0, "iteration": ITERATION}
    place = folder / PLACE
    place.mkdir(parents=True, exist_ok=True)
    context = SimpleNamespace(get_context=lambda kind: _PROCESSES)
    with (
        without_cuda(torch.device("cpu")),
        mock.patch.object(filesystem_async, "mp", context),
        mock.patch.object(filesystem_async, "_results_queue", None),
    ):
        for number, chunk in enumerate(chunks):
            name = "model" if len(chunks) == 1 else f"model{number}"
            state[name] = chunk.sharded_state_dict(metadata=metadata)
        if optimizer:
            state |= _training_state(chunks)
        torch.distributed.barrier()
        dist_checkpointing.save(state, str(place))
    if torch.distributed.get_rank() == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    torch.distributed.barrier()


def _training_state(chunks: list[nn.Module]) -> dict[str, Any]:
    """Entries as the distributed optimizer and the random number generators leave them, one for each rank."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    moments = {
        f"optimizer.state.{kind}.decoder.layers.mlp.linear_fc1.weight": torch.full((4, 6), float(rank))
        for kind in ("exp_avg", "exp_avg_sq", "fp32_param")
    }
    return {
        "optimizer": {key: ShardedTensor.from_rank_offsets(key, x, (0, rank, world)) for key, x in moments.items()},
        "rng_state": ShardedObject("rng_state", {"torch": torch.get_rng_state()}, (world,), (rank,)),
    }


def saved_model(source: Path, folder: Path, sizes: dict, **how: Any) -> None:
    """In a rank: save the model of an HF folder at these sizes."""
    with loaded(source, **sizes) as (model, _):
        save(model, folder, read_json(source / "config.json"), **how)


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    """Give the tensors of an iteration other keys, as another layer spec would have."""
    path = folder / ".metadata"
    held = pickle.loads(path.read_bytes())  # noqa: S301 - made by this test
    held.state_dict_metadata = {rename(key): said for key, said in held.state_dict_metadata.items()}
    stored = held.storage_data.items()
    held.storage_data = {MetadataIndex(rename(one.fqn), one.offset, one.index): info for one, info in stored}
    path.write_bytes(pickle.dumps(held))


def changing(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """Another name for a key, by patterns."""

    def rename(key: str) -> str:
        for pattern, new in pairs:
            key = re.sub(pattern, new, key)
        return key

    return rename


def metadata_changed(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """What changes what `.metadata` of a folder holds."""

    def rewrite(place: Path) -> None:
        held = pickle.loads((place / ".metadata").read_bytes())
        change(held)
        (place / ".metadata").write_bytes(pickle.dumps(held))

    return rewrite


def without_weights(source: Path, folder: Path) -> Path:
    """Config and tokenizer of a model, and nothing to take weights from."""
    return Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def reading(folder: Path, *forms: str) -> tuple:
    """Flags that read a checkpoint, and in a form that needs it the calibration, of a folder as tests lay it out: `hf`, `saved`."""
    flags = ("--hf-model", folder / "hf", "--megatron-checkpoint", folder / "saved")
    for form in forms:
        flags += ("--format", form)
        flags += () if form in ("bf16", "fp8_pb") else ("--load-calibration", folder / "calibration.safetensors")
    return flags


def assert_keys(expected: dict[str, dict[str, tuple]], folders: dict[str, Path]) -> dict[str, dict]:
    """The checkpoint of each case has keys of these sizes; returns what `.metadata` says of all, by case."""
    said = {case: FileSystemReader(folders[case] / "saved" / PLACE).read_metadata() for case in expected}
    found = {case: one.state_dict_metadata for case, one in said.items()}
    assert {case: {key: tuple(found[case][key].size) for key in keys} for case, keys in expected.items()} == expected
    return found


def export_and_save(
    model: nn.Module | list[nn.Module], source: Path, folder: Path, forms: tuple[str, ...], alike: bool, **asked: Any
) -> None:
    """On every rank: export a model in every form, the last of which needs calibration, and save it."""
    config = read_json(source / "config.json")
    measured = calibrate(model, batches(source), format=forms[-1])
    if torch.distributed.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        save_calibration(measured, folder / "calibration.safetensors", config)
    how = asked.pop("how", {})
    for form in forms:
        given = measured if form == forms[-1] else None
        export_hf_checkpoint(model, folder / form, hf_model=source, format=form, calibration=given, **asked)
    if alike:
        model.config.moe_layer_freq = 1  # not a list: then layers share tensors
    save(model, folder / "saved", config, **how)
