"""Experts that transformers keeps in two stacks, as linears of their own: so they are on disk, or so each can be emulated.

    on disk                                     here
    experts.K.gate_proj, up_proj, down_proj     the same
    experts.gate_up_proj, experts.down_proj     experts.gate_up_proj.K, experts.down_proj.K, where they are quantized;
                                                or [in, out] unlike in memory (Qwen3-VL);
                                                transformers' own module, where they are not

`emulation.py` puts emulated linears into the place of those that are quantized.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..common.errors import ExportError
from .transformers_names import Respelled

STACKS = ("gate_up_proj", "down_proj")


class EmulatedExperts(nn.Module):
    """The experts of a layer, called as transformers calls `theirs`, which has them stacked; `alone`: as they are on disk.

    `theirs` keeps its gate, which is called here, and loses its weights.
    """

    def __init__(self, theirs: nn.Module, alone: bool) -> None:
        super().__init__()
        self.alone, self.gated, self.count = alone, _gate_of(theirs), len(theirs.gate_up_proj)
        double, hidden = theirs.gate_up_proj.shape[1:]
        if hidden != theirs.down_proj.shape[1]:  # [in, out] each
            double, hidden = hidden, double
        width, linear = double // 2, partial(nn.Linear, bias=hasattr(theirs, "down_proj_bias"), dtype=torch.bfloat16)
        for name, _ in list(theirs.named_parameters(recurse=False)):
            delattr(theirs, name)
        if not alone:
            self.gate_up_proj = nn.ModuleList(linear(hidden, double) for _ in range(self.count))
            self.down_proj = nn.ModuleList(linear(width, hidden) for _ in range(self.count))
            return
        sizes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
        for number in range(self.count):
            self.add_module(str(number), nn.ModuleDict({name: linear(*size) for name, size in sizes.items()}))

    def expert(self, number: int, inputs: Tensor) -> Tensor:
        """What one expert makes of its tokens, [tokens, hidden] both."""
        if not self.alone:
            return self.down_proj[number](self.gated(self.gate_up_proj[number](inputs)))
        linears = self.get_submodule(str(number))
        both = torch.cat([linears["gate_proj"](inputs), linears["up_proj"](inputs)], dim=-1)
        return linears["down_proj"](self.gated(both))

    def forward(self, inputs: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """[tokens, hidden], and the experts of each token and their weights [tokens, k] -> [tokens, hidden].

        Llama 4 gives neither, and [experts * tokens, hidden]: all tokens once for every expert, multiplied by their weights
        for it; of most that leaves zeros, which stay zeros. It gets as many.
        """
        outputs, tokens = torch.zeros_like(inputs), len(inputs) // self.count
        for number in range(self.count):
            if chosen is None:
                own = inputs[number * tokens : (number + 1) * tokens]
                token, scale = number * tokens + own.any(dim=-1).nonzero().squeeze(-1), 1
            else:
                token, place = torch.where(chosen == number)
                scale = weights[token, place, None]
            if len(token):
                outputs.index_add_(0, token, (self.expert(number, inputs[token]) * scale).to(outputs.dtype))
        return outputs


def _gate_of(theirs: nn.Module) -> Callable[[Tensor], Tensor]:
    """What is done between the linears of an expert: [tokens, 2 * width] -> [tokens, width]."""
    if hasattr(theirs, "_apply_gate"):
        return theirs._apply_gate

    def gated(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return theirs.act_fn(gate) * up

    return gated


def take_apart(model: nn.Module, tensors: Respelled, scales: tuple[str, ...]) -> None:
    """Experts that transformers stacks become linears, where the files have them so, with codes or `scales`, or turned."""
    for name, module in list(model.named_modules()):
        if name.endswith(".experts") and not hasattr(module, STACKS[0]) and hasattr(module, "up_proj"):
            raise ExportError(
                f"{tensors.folder}: experts without gates, as at {name}, are not emulated. Leave --text out, or score it with an "
                "engine"
            )
        if not all(isinstance(getattr(module, stack, None), nn.Parameter) for stack in STACKS):
            continue
        count = len(module.gate_up_proj)
        alone = any(f"{name}.{number}.gate_proj.weight" in tensors for number in range(count))
        stacks = [f"{name}.{stack}.0" for stack in STACKS]
        turned = tensors.turned(f"{name}.{STACKS[0]}", module.gate_up_proj)
        if alone or turned or any(tensors.quantized(stack, scales) for stack in stacks):
            tensors.check_counts([f"{stack}.{leaf}" for stack in stacks for leaf in ("weight", "bias", *scales)], count)
            model.set_submodule(name, EmulatedExperts(module, alone))
