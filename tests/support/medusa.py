"""In a rank: Medusa's heads in a live Megatron model, their modules called as ModelOpt calls them, which is not needed here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_export.mcore.cpu_compat import without_cuda
from megatron_export.mcore.model import chunks_of

from .eagle import numbers
from .live import loaded


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)


class Head(MegatronModule):
    """Blocks that every rank holds whole, and an output layer whose rows ranks share."""

    def __init__(self, config: Any, blocks: int, tokens: int) -> None:
        super().__init__(config)
        self.medusa_layers = nn.ModuleList(Block(config.hidden_size) for _ in range(blocks))
        how = {"init_method": config.init_method, "bias": False, "gather_output": False}
        self.lm_head = ColumnParallelLinear(config.hidden_size, tokens, config=config, **how)


class Heads(MegatronModule):
    """As a list has them, and saved as Megatron's modules are."""

    def __init__(self, config: Any, count: int, blocks: int, tokens: int) -> None:
        super().__init__(config)
        for number in range(count):
            self.add_module(str(number), Head(config, blocks, tokens))


def of_rank(name: str, whole: Tensor, rank: int, tp: int) -> Tensor:
    return whole.chunk(tp)[rank] if name.endswith("lm_head.weight") else whole


@contextmanager
def with_heads(source: Path, tp: int = 1, pp: int = 1, heads: int = 3, blocks: int = 1) -> Iterator[Any]:
    """This rank's part of a model with heads on its last stage, and the whole tensors of these, random by name."""
    with loaded(source, tp, pp) as (model, _):
        chunk = chunks_of(model)[-1]
        whole: dict[str, Tensor] = {}
        if chunk.post_process:
            with without_cuda(torch.device("cpu")):
                chunk.medusa_heads = Heads(chunk.config, heads, blocks, chunk.vocab_size).bfloat16()
            rank, held = parallel_state.get_tensor_model_parallel_rank(), dict(chunk.medusa_heads.named_parameters())
            rows = {name: tp if name.endswith("lm_head.weight") else 1 for name in held}
            shapes = {name: (one.shape[0] * rows[name], *one.shape[1:]) for name, one in held.items()}
            whole = numbers(shapes, chunk.vocab_size)
            for name, one in whole.items():
                held[name].data.copy_(of_rank(name, one, rank, tp))
        yield model, whole
