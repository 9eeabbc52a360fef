"""A live model as calibration sees it: what there is of it on this rank, and a way to run it that shows its calls to an observer.

Each kind of model has a module with a `Subject`, which is imported where such a model is given.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..common.cpu_products import fast_products
from ..common.optional import part
from ..distributed.topology import Topology
from ..hf.model import is_transformers
from ..models.layouts import QKV, Layout
from .observer import Observer

Model = nn.Module | list[nn.Module]


class Weights(Protocol):
    """Tensors by canonical module, perhaps made when they are asked for; `shapes` makes none."""

    shapes: dict[str, tuple[int, ...]]

    def __getitem__(self, name: str) -> Tensor: ...

    def items(self) -> Iterable[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Facts:
    """What observers need to know.

    weights     canonical module -> this rank's shard of its weight, for every linear that a format may quantize
    layouts     canonical module -> how its output rows are laid out
    heads       how fused q, k and v are laid out; known on every rank, also on one without layers
    held_whole  the linears that every rank holds whole, though others of their kind are cut
    experts     the global numbers of this rank's experts
    repeats     how many ranks of the stage are shown the same token of an expert
    groups      the query groups of the whole model
    topk        how many experts a token is given to
    """

    weights: Weights
    layouts: dict[str, Layout]
    heads: QKV
    held_whole: set[str]
    experts: list[int]
    repeats: int
    groups: int
    topk: int


class Subject(Protocol):
    """A live model."""

    def __init__(self, model: Model) -> None: ...

    def world(self) -> AbstractContextManager[Topology]:
        """The ranks that calibrate it. Collective."""

    def check(self, here: Topology, batches: list[Tensor], searched: bool) -> None:
        """Refuse data that does not fit, and a model that cannot be measured; if AWQ searches (`searched`), not searched. On this
        rank alone.
        """

    def measured(self, here: Topology, batches: list[Tensor]) -> AbstractContextManager[Facts]:
        """While open, the model may be run; afterwards it is as it was. Collective."""

    def run(
        self,
        here: Topology,
        batches: list[Tensor],
        steps: Iterator[Tensor],
        observer: Observer,
        all_experts: bool = False,
        head: bool = False,
        gradients: bool = False,
    ) -> None:
        """Run all batches through the model, as `steps` gives them, and show `observer` the calls of linears and attentions, with
        `head` of the output layer too.

        With `all_experts` it sees each expert called with all tokens; with `gradients`, linears alone, in the backward pass.
        """


def subject_of(model: Model) -> Subject:
    """The model as calibration sees it."""
    return part(f"calibration.{'hf' if is_transformers(model) else 'mcore'}.subject").Subject(model)


@contextmanager
def evaluating(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """While open, these are in evaluation mode, and fast if `device` is a CPU; afterwards every attribute of each is what it was.

    That takes more than the mode: Megatron's schedules leave numbers of micro-batches and received activations in modules.
    """
    modules = list(modules)
    attributes = [dict(vars(module)) for module in modules]
    for module in modules:
        module.training = False
    try:
        with fast_products(device):
            yield
    finally:
        for module, were in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(were)
