"""Experts that transformers keeps in two stacks, as linears of their own: so they are on disk, or so each can be emulated.

    on disk                                     here
    experts.K.gate_proj, up_proj, down_proj     the same
    experts.gate_up_proj, experts.down_proj     experts.gate_up_proj.K, experts.down_proj.K, where they are quantized;
                                                or [in, out] unlike in memory (Qwen3-VL);
                                                transformers' own module, where they are not
    experts.K.up_proj, down_proj                the same, of experts without gates

`emulation.py` puts emulated linears into the place of those that are quantized.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .transformers_names import Respelled

STACKS = {True: ("gate_up_proj", "down_proj"), False: ("up_proj", "down_proj")}  # with gates, and without


class EmulatedExperts(nn.Module):
    """The experts of a layer, called as transformers calls `theirs`, which has them stacked; `alone`: as they are on disk.

    `theirs` keeps its gate, which is called here, and loses its weights.
    """

    def __init__(self, theirs: nn.Module, alone: bool) -> None:
        super().__init__()
        has_gate = hasattr(theirs, "gate_up_proj")
        self.alone, self.gated, self.count = alone, _gate_of(theirs, has_gate), len(theirs.down_proj)
        self.stacks = STACKS[has_gate]
        rows, hidden = getattr(theirs, self.stacks[0]).shape[1:]
        if hidden != theirs.down_proj.shape[1]:  # [in, out] each
            rows, hidden = hidden, rows
        width = rows // (1 + has_gate)
        linear = partial(nn.Linear, bias=hasattr(theirs, "down_proj_bias"), dtype=torch.bfloat16)
        for name, _ in list(theirs.named_parameters(recurse=False)):
            delattr(theirs, name)
        if not alone:
            for stack, size in zip(self.stacks, ((hidden, rows), (width, hidden)), strict=True):
                self.add_module(stack, nn.ModuleList(linear(*size) for _ in range(self.count)))
            return
        sizes = {"gate_proj": (hidden, width)} if has_gate else {}
        sizes |= {"up_proj": (hidden, width), "down_proj": (width, hidden)}
        for number in range(self.count):
            self.add_module(str(number), nn.ModuleDict({name: linear(*size) for name, size in sizes.items()}))

    def expert(self, number: int, inputs: Tensor) -> Tensor:
        """What one expert makes of its tokens, [tokens, hidden] both."""
        if not self.alone:
            first, second = (self.get_submodule(stack)[number] for stack in self.stacks)
            return second(self.gated(first(inputs)))
        *first, second = self.get_submodule(str(number)).values()
        return second(self.gated(torch.cat([linear(inputs) for linear in first], dim=-1)))

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


def _gate_of(theirs: nn.Module, has_gate: bool) -> Callable[[Tensor], Tensor]:
    """What is done between the linears of an expert: [tokens, 2 * width], [tokens, width] without a gate -> [tokens, width]."""
    if not has_gate:
        return theirs.act_fn
    if hasattr(theirs, "_apply_gate"):
        return theirs._apply_gate

    def gated(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return theirs.act_fn(gate) * up

    return gated


def take_apart(model: nn.Module, tensors: Respelled, scales: tuple[str, ...]) -> None:
    """Experts that transformers stacks become linears, where the files have them so, with codes or `scales`, or turned."""
    for name, module in list(model.named_modules()):
        own = STACKS[hasattr(module, "gate_up_proj")]
        if not all(isinstance(getattr(module, stack, None), nn.Parameter) for stack in own):
            continue
        count = len(module.down_proj)
        alone = any(f"{name}.{number}.up_proj.weight" in tensors for number in range(count))
        stacks = [f"{name}.{stack}.0" for stack in own]
        turned = tensors.turned(f"{name}.{own[0]}", getattr(module, own[0]))
        if alone or turned or any(tensors.quantized(stack, scales) for stack in stacks):
            tensors.check_counts([f"{stack}.{leaf}" for stack in stacks for leaf in ("weight", "bias", *scales)], count)
            model.set_submodule(name, EmulatedExperts(module, alone))
