"""The Megatron model of a run of the command: its ranks are started, and it is built and filled there."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from ..checkpoint.original import Original
from ..checkpoint.torch_dist import MegatronCheckpoint
from ..common.progress import Progress
from ..distributed.collectives import together
from ..distributed.signals import heeded
from ..distributed.topology import Topology
from ..export import prepare
from ..export.origins import Unbuilt
from ..mcore import build, load_hf, load_torch_dist, parallel_state
from ..mcore.model import Model
from .config import ExportConfig


@contextmanager
def world(config: ExportConfig) -> Iterator[Topology]:
    """The ranks of a `torchrun`, or this process alone, with Megatron's model parallelism. Collective."""
    sizes = {"ep": config.ep, "etp": config.etp, "vpp": config.vpp}
    started = parallel_state.started(config.tp, config.pp, config.device, **sizes)
    with started, parallel_state.current(config.request.timeout) as here:
        yield here


def check(config: ExportConfig, hf_config: dict, here: Topology) -> None:
    """`ExportError` unless the model of config.json's dict divides by these sizes."""
    build.check_divides(hf_config, here, config.pp_layout)


def unbuilt(config: ExportConfig) -> Unbuilt:
    """The model before it is built."""
    return Unbuilt(config.pp_layout)


built = prepare.built  # how the opening goes on


def load(
    config: ExportConfig,
    original: Original,
    checkpoint: MegatronCheckpoint | None,
    length: int | None,
    here: Topology,
    progress: Progress,
) -> tuple[Model, int]:
    """The model, built and filled on this topology, and the bytes of weights that this rank read. Collective.

    length  of the samples that it will be run on; None: it will not be
    """
    with together(here, "build the model"):
        model = build.build_model(original.config, here, max_sequence_length=length, pp_layout=config.pp_layout)
    with together(here, "load the weights"):
        steps = partial(_located, here, progress)
        if checkpoint:
            read = load_torch_dist.load_checkpoint(model, checkpoint, here, steps)
        else:
            read = load_hf.load_hf_weights(model, original.weights, original.config, here, steps, original.dropped)
    here.pulse.at("load the weights", "")
    return model, read


def _located(here: Topology, progress: Progress, steps: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The steps of loading, each of which says where this rank is."""
    for name, shard in heeded(progress("load", steps)):
        here.pulse.at("load the weights", name)
        yield name, shard
