"""The tensors of an HF checkpoint become the shards of a Megatron-Core model.

Reading uses the same tables and layouts as writing, inverted, and each rank reads only the rows or columns it holds.
A few threads read, cast and join parameters ahead of the one that is next. On the CPU they also fill the model; for a
GPU they leave page-locked copies, which this thread sends on their way without waiting for the ones before.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.hf_storage import HfStorage
from ..checkpoint.hf_weights import SourceWeights
from ..checkpoint.original import wide_of
from ..common.errors import report
from ..common.piece import Axis
from ..common.prefetch import in_order
from ..common.shards import fillable
from ..distributed.topology import Cut, Topology
from ..models import Source, is_expert, parameters_of
from ..models.layouts import even_cut
from ..models.sources import part_shapes
from .model import Model, canonical_tensors, chunks_of, copies_of, shards_of

LOCKED_BYTES = 32 << 20  # of a page-locked piece: torch rounds these up to powers of two, and keeps them


def load_hf_weights(
    model: Model,
    place: Path | HfStorage,
    config: dict,
    topology: Topology,
    progress: Callable[[Iterable], Iterable] = iter,
    dropped: tuple[str, ...] = (),
) -> int:
    """Fill this rank's shards, and its copy of the embedding, from the safetensors files of a folder, or another storage; returns
    the bytes read.

    Tensors whose names begin with one of `dropped` are passed over. `ExportError` for tensors that are missing, of another shape or
    too many, for those that would be replaced by another that is not equal, and for NaN and Inf.
    """
    with SourceWeights(place, config=config) as weights:
        wide = wide_of(weights, config)
        sources = {name: source.as_stored(wide) for name, source in parameters_of(config).items()}
        _widen(model, {name for name, one in sources.items() if one.rule.as_stored and one.dtype == "F32"})
        shards = fillable(shards_of(model).live | copies_of(model), topology.device)
        weights.check_model(config, dropped)
        weights.check_shared(config, topology.rank, topology.world)
        jobs = [
            (shard.nbytes, partial(_read, weights, sources[name], shard, topology.cut(is_expert(name))))
            for name, shard in shards.items()
        ]
        with closing(in_order(jobs)) as filled:
            finite = [fill() for _, fill in zip(progress(shards.items()), filled, strict=True)]
        good = torch.stack(finite).tolist() if finite else ()  # the one wait for a GPU
        damaged = [name for name, whole in zip(shards, good, strict=True) if not whole]
        said = "{}: NaN or Inf in {}. The checkpoint is damaged: fetch or save it again"
        report([said.format(weights.folder, ", ".join(sources[name].names().values())) for name in damaged])
        return weights.nbytes


def _widen(model: Model, names: set[str]) -> None:
    """Make the parameters of these names float32: they are written in it, as the original has them."""
    for chunk in chunks_of(model):
        for name, tensor in canonical_tensors(chunk):
            if name in names:
                tensor.data = tensor.data.float()


def _read(weights: SourceWeights, source: Source, shard: Tensor, cut: Cut) -> Callable[[], Tensor]:
    """Read a shard. The function that this returns fills it, if that is not done yet, and says whether it is finite, bool []."""
    loaded = shard_of(weights, source, shard, cut)
    if shard.device.type == "cpu":
        finite = _finite(shard.copy_(loaded))
        return lambda: finite
    rows = max(LOCKED_BYTES * len(loaded) // loaded.nbytes, 1)
    pieces = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True).copy_(p) for p in loaded.split(rows)]
    return partial(_send, pieces, shard, rows)


def _send(pieces: list[Tensor], shard: Tensor, rows: int) -> Tensor:
    for piece, place in zip(pieces, shard.split(rows), strict=True):
        place.copy_(piece, non_blocking=True)
    return _finite(shard)


def _finite(values: Tensor) -> Tensor:
    """Whether there is no NaN and no Inf, bool []: from the extremes, which NaN spreads to, without a copy of the values."""
    return torch.stack(torch.aminmax(values)).isfinite().all()


def shard_of(weights: SourceWeights, source: Source, shard: Tensor, cut: Cut) -> Tensor:
    """What belongs into a rank's `shard` of a parameter, in its shape; `cut` says which of the shards it is."""
    whole = source.cut is None or (source.either and shard.shape == source.shape)
    index, count = (0, 1) if whole else (cut.rank, cut.size)
    parts, own = {}, source.layout.splits(shard.shape[0])
    for part, size in part_shapes(source).items():
        if source.cut is Axis.IN:
            where = (slice(None), even_cut(size[1], index, count))
        else:
            where = (source.layout.source(size[0], index, count, shard.shape[0]) if own else slice(None),)
        parts[part] = weights.read_part(source, part, where)
    if own:
        return source.layout.join(parts, shard.shape[0])
    joined = source.layout.join(parts, source.shape[0])
    return torch.cat([joined[rows] for rows in source.layout.rows(source.shape[0], index, count, shard.shape[0])])
