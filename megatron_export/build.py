"""An HF config becomes a Megatron-Core model on this topology, and HF weights become its shards.

Reading uses the same tables and layouts as writing, inverted, and each rank reads only the rows or columns it holds.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .cpu import without_cuda
from .errors import ExportError, report
from .layout import even_cut
from .model import shards_of
from .names import Source, parameters_of, rope_settings, settings_of, shape_of, unscaled_rope_settings
from .piece import Axis
from .topology import Topology

PAD_VOCAB_TO = 128
_PLAIN = ("BF16", "F16", "F32")


def check_divides(config: dict, topology: Topology) -> None:
    """Raise unless heads, groups, sizes and layers divide by this topology."""
    shape = shape_of(config)
    divided = (
        ("num_attention_heads", shape.heads, "--tp", topology.tp_size),
        ("num_key_value_heads", shape.groups, "--tp", topology.tp_size),
        ("hidden_size", shape.hidden, "--tp", topology.tp_size),
        ("intermediate_size", shape.ffn, "--tp", topology.tp_size),
        ("num_hidden_layers", shape.layers, "--pp", topology.pp_size),
    )
    report(
        [
            f"{name} {size} does not divide by {flag} {by}. Give a {flag} that divides it"
            for name, size, flag, by in divided
            if size % by
        ]
    )


def build_model(
    config: dict,
    topology: Topology,
    *,
    max_sequence_length: int | None,
    dtype: torch.dtype = torch.bfloat16,
    initialize: bool = False,
) -> GPTModel:
    """This rank's part of a `GPTModel` (local spec, no fusions) for config.json's dict, in `dtype`.

    Without `max_sequence_length` it holds weights but cannot be run, so that rope scaling that Megatron-Core does not
    know is no obstacle. Weights are left as allocated unless `initialize`. Sizes that this topology does not divide
    raise `ExportError`.
    """
    check_divides(config, topology)
    shape = shape_of(config)
    on_cpu = topology.device.type == "cpu"
    settings = TransformerConfig(
        **settings_of(config),
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=on_cpu,
        perform_initialization=initialize,
        activation_func=torch.nn.functional.silu,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=settings.qk_layernorm, normalization="RMSNorm")
    padding = PAD_VOCAB_TO * topology.tp_size
    with without_cuda(topology.device):
        model = GPTModel(
            config=settings,
            transformer_layer_spec=spec,
            vocab_size=-(-shape.vocab // padding) * padding,
            max_sequence_length=max_sequence_length or 1,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=shape.tied,
            **(rope_settings(config) if max_sequence_length else unscaled_rope_settings(config)),
        )
        return model.to(device=topology.device, dtype=dtype)


def load_hf_weights(
    model: GPTModel, folder: Path, config: dict, topology: Topology, progress: Callable[[Iterable], Iterable] = iter
) -> int:
    """Fill this rank's shards from the safetensors files in `folder`; returns the bytes read.

    Also fills the copy of tied embeddings that Megatron keeps on the last pipeline stage.
    """
    sources, shards = parameters_of(config), shards_of(model)
    if shape_of(config).tied and model.post_process and not model.pre_process:
        name = "embedding.word_embeddings.weight"
        shards[name] = model.output_layer.weight.detach()
    with SourceWeights(folder) as weights:
        weights.check({name: shape for source in sources.values() for name, shape in _hf_shapes(source).items()})
        for name, shard in progress(shards.items()):
            loaded = _shard(weights, sources[name], shard, topology)
            if not loaded.isfinite().all():
                names = ", ".join(sources[name].names().values())
                raise ExportError(f"{folder}: NaN or Inf in {names}. The checkpoint is damaged: fetch or save it again")
            shard.copy_(loaded)
        return weights.nbytes


def _shard(weights: "SourceWeights", source: Source, shard: Tensor, topology: Topology) -> Tensor:
    index, count = (topology.tp_rank, topology.tp_size) if source.cut else (0, 1)
    parts = {}
    for part, name in source.names().items():
        whole = weights.shape(name)
        if source.cut is Axis.IN:
            parts[part] = weights.read(name, (slice(None), even_cut(whole[1], index, count)))
        else:
            parts[part] = weights.read(name, (source.layout.source(whole[0], index, count, shard.shape[0]),))
    return source.layout.join(parts, shard.shape[0])


def _hf_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """HF tensor name -> the shape that config.json means it to have."""
    parts = source.layout.split(torch.empty(source.shape, device="meta"), 0, 1)
    return {name: tuple(parts[part].shape) for part, name in source.names().items()}


class SourceWeights:
    """The tensors of an HF checkpoint folder, by name; slices are read from disk when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self.open = {}
        self.nbytes = 0  # read so far
        for path in sorted(set(self.files.values())):
            self.open[path] = _opened(path)

    def __enter__(self) -> "SourceWeights":
        return self

    def __exit__(self, *error: object) -> None:
        self.open.clear()

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise unless the checkpoint holds the names and shapes that the tables expect, and no number is quantized.

        Rotary buffers of old files may be there too, and the output layer of a tied model.
        """
        names = {path: set(file.keys()) for path, file in self.open.items()}
        lacking = sorted(name for name, path in self.files.items() if name not in names[path])
        report(
            [f"{self.files[name]}: the index says that {name} is here. Fetch file and index again" for name in lacking]
        )
        found = {name for name in self.files if not name.endswith("rotary_emb.inv_freq")}
        missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys() - {"lm_head.weight"})
        problems = [f"{self.folder}: tensor {name} is missing. Fetch the checkpoint again" for name in missing]
        problems += [
            f"{self.folder}: tensor {name} is not part of this architecture. Give a model without it" for name in extra
        ]
        for name in sorted(expected.keys() & found):
            if tuple(self.shape(name)) != expected[name]:
                problems.append(
                    f"{self.folder}: tensor {name} is {tuple(self.shape(name))}, but config.json means {expected[name]}. "
                    "Give the config.json that belongs to these weights"
                )
            if self.dtype(name) not in _PLAIN:
                problems.append(
                    f"{self.folder}: tensor {name} is {self.dtype(name)}, not one of {', '.join(_PLAIN)}: quantized "
                    "already? Give the original model"
                )
        report(problems)

    def shape(self, name: str) -> list[int]:
        return self.open[self.files[name]].get_slice(name).get_shape()

    def dtype(self, name: str) -> str:
        """As safetensors spells it."""
        return self.open[self.files[name]].get_slice(name).get_dtype()

    def read(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """The part of tensor `name` that `where` selects, in bfloat16."""
        part = self.open[self.files[name]].get_slice(name)[where]
        self.nbytes += part.nbytes
        return part.to(torch.bfloat16)


def _files(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(
                f"{index}: not the index of a checkpoint ({type(error).__name__}: {error}). Fetch it again"
            ) from error
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ExportError(
            f"{folder}: no weights: neither {single.name} nor {index.name} is there. Give a checkpoint in safetensors format"
        )
    return dict.fromkeys(_opened(single).keys(), single)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path}: not a readable safetensors file ({error}). Fetch this file again") from error
