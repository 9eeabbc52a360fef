"""Models of known shapes without files: configs as they are published, and weights made from their names.

A weight's row is a stretch of one fixed vector of random numbers; which one follows from the tensor's HF name and the row's
number, so that a rank makes just the rows and columns it holds, on its device, and every topology has the same model.
"""

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_export.calibration.lookup import needed_by
from megatron_export.common.errors import ExportError
from megatron_export.common.file_names import CONFIG
from megatron_export.models import Source, is_expert, parameters_of
from megatron_export.models.sources import split_shapes
from megatron_export.planning.plan import Plan

if TYPE_CHECKING:
    from megatron_export.distributed.topology import Topology

STD = 0.02
NUMBERS = 1 << 20  # of the vector; rows begin at different places of it
STRIDE = 40503  # from one row's place to the next one's, odd


SIZES = (
    *("hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size"),
)
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}


def _dense(*sizes: int) -> dict:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | dict(zip(SIZES, sizes, strict=True))


def _experts(expert_ffn: int, *sizes: int) -> dict:
    return _dense(*sizes, 4, 151936) | QWEN | {"moe_intermediate_size": expert_ffn}


_ALL = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "torch_dtype": "bfloat16"}
SHAPES = {
    name: _ALL | config
    for name, config in {
        "tiny": _dense(128, 2, 384, 4, 2, 512),
        "1b": _dense(2048, 22, 5632, 32, 4, 32000),
        "8b": _dense(4096, 32, 14336, 32, 8, 128256),
        "70b": _dense(8192, 80, 28672, 64, 8, 128256),
        "405b": _dense(16384, 126, 53248, 128, 8, 128256),
        "30b-a3b": _experts(768, 2048, 48, 6144, 32),
        "235b-a22b": _experts(1536, 4096, 94, 12288, 64),
    }.items()
}


def config_of(shape: str, hf_model: str | None, layers: int | None) -> dict:
    """The config of a known shape, or of a model's folder, perhaps with another number of layers."""
    if hf_model:
        from megatron_export.checkpoint import hf_folder

        config = hf_folder.read_config(hf_folder.find_model(hf_model, weights=False))
    else:
        config = SHAPES[shape]
    if layers is not None and layers < 1:
        raise ExportError(f"--layers must be at least 1, not {layers}")
    return config if layers is None else config | {"num_hidden_layers": layers}


def write_config(folder: Path, config: dict) -> Path:
    """A model's folder with nothing but its config.json."""
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


class MadeWeights:
    """Stands where loading has the files of a checkpoint, and makes what it is asked for."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.numbers = (torch.randn(2 * NUMBERS, generator=generator) * STD).to(device)

    def read_part(self, source: Source, part: str, where: tuple[slice, ...]) -> Tensor:
        """What `where` selects of a part of a parameter, [out, in] or [out]; norms are around 1."""
        shape = dict(split_shapes(source.layout, source.shape))[part]
        place = zlib.crc32(f"{source.canonical}.{part}".encode()) % NUMBERS
        rows = range(*where[0].indices(shape[0]))
        if len(shape) == 1:
            return (1 + self.numbers[place:][: shape[0]][where[0]]).to(source.torch_dtype)
        columns = range(*(where[1] if len(where) > 1 else slice(None)).indices(shape[1]))
        numbers = self.numbers.to(source.torch_dtype).unfold(0, len(columns), 1)
        first = (place + torch.arange(rows.start, rows.stop, device=numbers.device) * STRIDE) % NUMBERS
        return numbers[first + columns.start]


def fill(model: nn.Module | list[nn.Module], config: dict, here: "Topology") -> None:
    """Give a model the weights that its parameters' names mean."""
    from megatron_export.mcore.load_hf import shard_of
    from megatron_export.mcore.model import shards_of

    weights, sources = MadeWeights(here.device), parameters_of(config)
    for name, shard in shards_of(model).items():
        shard.copy_(shard_of(weights, sources[name], shard, here.cut(is_expert(name))))


def build(source: str, config: dict, here: "Topology", tokens: int | None = None) -> nn.Module | list[nn.Module]:
    """A model of Megatron-Core or of transformers (`source`) with the same weights; of Megatron for samples of so many tokens."""
    if source == "transformers":
        return _of_transformers(config, here)
    from megatron_export.mcore import build as megatron

    model = megatron.build_model(config, here, max_sequence_length=tokens)
    fill(model, config, here)
    return model


def _of_transformers(config: dict, here: "Topology") -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**config)
    with torch.device(here.device):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
    weights, tensors = MadeWeights(here.device), {name: one.detach() for name, one in model.named_parameters()}
    named = {name: (source, part) for source in parameters_of(config).values() for part, name in source.names().items()}
    if odd := tensors.keys() ^ named.keys():
        raise ExportError(f"--source transformers: {min(odd)} has another name there. Give a --shape without experts")
    for name, (source, part) in named.items():
        tensors[name].copy_(weights.read_part(source, part, (slice(None),)))
    return model


def made_up(plan: Plan) -> dict[str, Tensor]:
    """The statistics that a plan needs, all of them 1."""
    shapes: dict[str, tuple[int, ...]] = {}
    for item in plan.items:
        shapes |= {name: shape for name, shape in needed_by(item).items() if shape is not None}
    return {name: torch.ones(shape) for name, shape in shapes.items()}
