"""Small checkpoints as an export on one rank writes them, without Megatron: the plan's own items, split and encoded whole."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_export.checkpoint.hf_weights import SourceWeights, copied_tensors
from megatron_export.common.file_names import INDEX
from megatron_export.common.piece import Piece
from megatron_export.formats import Options
from megatron_export.models import copied_prefixes
from megatron_export.planning.parameter import Item
from megatron_export.planning.plan import Plan
from megatron_export.planning.quant_config import config_json, hf_quant_config
from megatron_export.planning.smoothed import Measured
from megatron_export.writing.writer import write_json

from .models import read_json, tensors
from .plans import plan_of


def exported(reference: Path, folder: Path, format: str | None, **settings: object) -> Plan:
    """Write what an export of `reference` would; calibration is made up. Returns its plan."""
    config = read_json(reference / "config.json")
    options = Options(**settings.pop("options", {}))
    copied = copied_tensors(reference, copied_prefixes(config))
    plan = plan_of(config, format=format, options=options, copied=copied, **settings)
    folder.mkdir(parents=True)
    with SourceWeights(reference) as weights:
        parts = {item.source.canonical: _parts(item, weights, plan) for item in plan.items}
    slices: dict[str, dict[int, Tensor]] = {}
    for item in plan.items:
        name = item.source.canonical
        encoded = item.encode(parts[name], 0, _amax(plan, name, parts), _measured(item, plan))
        for output, tensor in item.assembled(encoded):
            slices.setdefault(output.name, {})[output.index] = tensor
    held = {name: list(found.values()) for name, found in slices.items()}
    made = {name: torch.stack(found) if len(found) > 1 else found[0] for name, found in held.items()}
    if copied:
        kept = tensors(reference)
        made |= {output.name: kept[output.name] for output in copied}
    for file, outputs in plan.files.items():
        save_file({o.name: made[o.name].contiguous().clone() for o in outputs}, folder / file)
    if len(plan.files) > 1:
        homes = {output.name: file for file, outputs in plan.files.items() for output in outputs}
        write_json(folder / INDEX, {"metadata": {"total_size": plan.nbytes}, "weight_map": homes})
    write_json(folder / "config.json", config_json(plan))
    if quant := hf_quant_config(plan):
        write_json(folder / "hf_quant_config.json", quant)
    return plan


def _parts(item: Item, weights: SourceWeights, plan: Plan) -> dict[str, Piece]:
    everything = (slice(None),) * len(item.source.shape)
    parts = {part: weights.read_part(item.source, part, everything) for part in item.source.layout.parts}
    return item.split(item.source.layout.join(parts, item.shard_shape[0]), 0, _measured(item, plan))


def _measured(item: Item, plan: Plan) -> Measured:
    """Made up, and the same for all who share a number; vectors between a half and two."""
    vectors = {}
    for name in item.smoothed.vectors:
        readers = [other for other in plan.items if other.smoothed.columns == name]
        generator = torch.Generator().manual_seed(len(name))
        values = 4.0 ** (torch.rand(readers[0].source.shape[1], generator=generator) - 0.5)
        feeding = next((i.source.layout for i in plan.items if ("v", name) in i.smoothed.rows), None)
        vectors[name] = feeding.same_in_group(values) if feeding else values
    kv = (torch.tensor(5.0), torch.tensor(2.0)) if item.kv else ()
    return Measured(input=torch.tensor(3.0), kv=kv, vectors=vectors)


def _amax(plan: Plan, name: str, parts: dict[str, dict[str, Piece]]) -> Tensor:
    fused = next((group for group in plan.fused if name in group), (name,))
    return torch.stack([piece.data.abs().amax().float() for other in fused for piece in parts[other].values()]).amax()
