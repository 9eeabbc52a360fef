"""Runs a Megatron-Core model for calibration, by Megatron's own schedules."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import chain, groupby, islice

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ...distributed.topology import Topology
from ...mcore import parallel_state
from ...mcore.cpu_compat import without_cuda
from ...mcore.gradients import only_activations
from ...mcore.late_weights import finish_gathering
from ...mcore.model import (
    Model,
    chunks_of,
    heads_of,
    layouts_of,
    local_experts_of,
    weights_of,
    whole_of,
)
from ..checks import check_batches
from ..observer import Observer
from ..subject import Facts, evaluating
from .checks import check_modules, check_parallelism, check_replicas
from .hooks import watching


class Subject:
    """This rank's part of a Megatron model (calibration/subject.py)."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def chunks(self) -> list[nn.Module]:
        return chunks_of(self.model)

    def world(self) -> AbstractContextManager[Topology]:
        return parallel_state.current()

    def check(self, here: Topology, batches: list[Tensor], searched: bool) -> None:
        check_parallelism(self.chunks[0], batches, here)
        check_batches(batches, self.chunks[0].vocab_size)
        check_modules(here, self.model, searched)

    @contextmanager
    def measured(self, here: Topology, batches: list[Tensor]) -> Iterator[Facts]:
        check_replicas(here, self.model, batches)
        finish_gathering(self.model)
        modules = (module for chunk in self.chunks for module in chunk.modules())
        with evaluating(modules, here.device), without_cuda(here.device):
            config = self.chunks[0].config
            # without sequence parallelism, all tensor-parallel ranks send the same token on
            repeats = here.experts.size * (1 if config.sequence_parallel else here.tp_size)
            yield Facts(
                weights=weights_of(self.model),
                layouts=layouts_of(self.model),
                heads=heads_of(self.model),
                held_whole=whole_of(self.model),
                experts=local_experts_of(self.model),
                repeats=repeats,
                groups=config.num_query_groups,
                topk=config.moe_router_topk,
            )

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
        """Megatron's own schedules take the micro-batches, those of one shape at a time. The interleaved schedule takes them in
        whole groups: the last one is repeated to fill its group, and not shown again.
        """
        chunks = self.chunks
        group = chunks[0].config.microbatch_group_size_per_vp_stage if len(chunks) > 1 else 1
        for shape, run in groupby(batches, key=lambda batch: tuple(batch.shape)):
            run = list(run)
            repeated = run[-1:] * (-len(run) % group)
            shown = chain(islice(steps, len(run)), repeated)
            with ExitStack() as stack:
                if gradients:
                    stack.enter_context(only_activations(self.model))
                elif not head:
                    stack.enter_context(_without_logits(chunks))
                stack.enter_context(watching(here, self.model, observer, len(run), all_experts, head, gradients))
                get_forward_backward_func()(
                    forward_step_func=partial(_step_with_loss if gradients else _step, here),
                    data_iterator=[shown, *(iter(run + repeated) for _ in chunks[1:])],
                    model=chunks,
                    num_microbatches=len(run) + len(repeated),
                    seq_length=shape[1],
                    micro_batch_size=shape[0],
                    forward_only=not gradients,
                )


@contextmanager
def _without_logits(chunks: list[nn.Module]) -> Iterator[None]:
    """While open, the model returns the hidden states of its last layer: the output layer, which nobody observes, is not called."""
    ends = [chunk for chunk in chunks if chunk.post_process]
    for chunk in ends:
        chunk.post_process = False
    try:
        yield
    finally:
        for chunk in ends:
            chunk.post_process = True


def _step(here: Topology, batches: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Callable]:
    ids = next(batches).to(here.device)
    # layers that predict one more token only run where there is something to predict
    output = _called(chunk, ids, ids if chunk.config.mtp_num_layers else None)
    return output, lambda made: (made.new_zeros(()), {})


def _step_with_loss(here: Topology, batches: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Callable]:
    """The loss is the sum over all tokens that have a next one."""
    ids = next(batches).to(here.device)
    count = torch.ones((), dtype=torch.int, device=ids.device)
    return _called(chunk, ids, ids.roll(-1, dims=1)), lambda losses: (losses[:, :-1].float().sum(), count, {})


def _called(chunk: nn.Module, ids: Tensor, labels: Tensor | None) -> Tensor:
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device).expand_as(ids)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).triu(1)  # True: not attended to
    return chunk(ids, positions, mask, labels=labels)
