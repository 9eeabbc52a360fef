"""The tensors of a Megatron checkpoint become the shards of a Megatron-Core model; each rank reads only what it holds."""

from collections.abc import Callable, Iterable

from ..checkpoint.torch_dist import MegatronCheckpoint
from ..common.errors import ExportError
from ..common.shards import fillable
from ..distributed.topology import Topology
from ..models import is_expert
from .model import Model, copies_of, shards_of


def load_checkpoint(
    model: Model,
    checkpoint: MegatronCheckpoint,
    topology: Topology,
    progress: Callable[[Iterable], Iterable] = iter,
) -> int:
    """Fill this rank's shards, and its copy of the embedding, from a checkpoint; returns the bytes read."""
    shards = fillable(shards_of(model).live | copies_of(model), topology.device)
    for name, shard in progress(shards.items()):
        cut = topology.cut(is_expert(name))
        loaded = checkpoint.shard(checkpoint.sources[name], tuple(shard.shape), cut.rank, cut.size)
        if not loaded.isfinite().all():
            raise ExportError(f"{checkpoint.folder}: NaN or Inf in {name}. Give another iteration, or copy it again")
        shard.copy_(loaded)
    return checkpoint.nbytes
