"""The safetensors files of an HF checkpoint become the shards of a Megatron-Core model.

Reading uses the same tables and layouts as writing, inverted, and each rank reads only the rows or columns it holds.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from .errors import ExportError
from .layout import even_cut
from .model import copies_of, shards_of
from .names import Source, copied_prefixes, is_expert, parameters_of
from .piece import Axis
from .source import SourceWeights, expected_shapes, part_shapes
from .topology import Cut, Topology


def load_hf_weights(
    model: nn.Module | list[nn.Module],
    folder: Path,
    config: dict,
    topology: Topology,
    progress: Callable[[Iterable], Iterable] = iter,
    dropped: tuple[str, ...] = (),
) -> int:
    """Fill this rank's shards from the safetensors files in `folder`; returns the bytes read.

    Also fills the copy of the embedding that Megatron keeps on the last pipeline stage. Tensors whose names begin with one
    of `dropped` are passed over.
    """
    sources, shards = parameters_of(config), shards_of(model) | copies_of(model)
    with SourceWeights(folder) as weights:
        weights.check(
            expected_shapes(sources.values()),
            copies={name for source in sources.values() for name in source.copies()},
            others=dropped + copied_prefixes(config),
        )
        for name, shard in progress(shards.items()):
            loaded = _shard(weights, sources[name], shard, topology.cut(is_expert(name)))
            if not loaded.isfinite().all():
                names = ", ".join(sources[name].names().values())
                raise ExportError(f"{folder}: NaN or Inf in {names}. The checkpoint is damaged: fetch or save it again")
            shard.copy_(loaded)
        return weights.nbytes


def _shard(weights: SourceWeights, source: Source, shard: Tensor, cut: Cut) -> Tensor:
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
    return source.layout.join(parts, source.shape[0])[even_cut(source.shape[0], index, count)]
