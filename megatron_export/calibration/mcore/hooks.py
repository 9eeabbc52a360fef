"""Shows an observer what the modules of a running model are called with: the only file that hooks Megatron's.

Megatron multiplies a token's probability in before `linear_fc2`, HF and engines after it. While watched, it is multiplied there, so
that experts see the inputs that engines give them; the output of the layer is the same but for rounding.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...common.piece import Axis
from ...common.shards import plain
from ...distributed.collectives import whole
from ...distributed.topology import Topology
from ...mcore.model import (
    Model,
    attentions_of,
    embeddings_of,
    experts_of,
    given_to_experts,
    grouped_weights,
    linear_input,
    linears_of,
    local_experts_of,
)
from ...models import cut_of, is_expert
from ..observer import Observer


@contextmanager
def watching(
    here: Topology,
    model: Model,
    observer: Observer,
    batches: int,
    all_experts: bool,
    head: bool = False,
    gradients: bool = False,
) -> Iterator[None]:
    """While open, `observer` sees the first `batches` calls of every linear and attention of this rank, with `head` of the output
    layer too.

    With `gradients` it sees linears alone, in the backward pass, for which what is embedded asks for a gradient. With `all_experts`
    it sees each expert called with all tokens, and the calls that the model itself makes are not shown.
    """
    watch = _Watch(here, observer, batches, all_experts, local_experts_of(model))
    with ExitStack() as hooks:
        for name, module in linears_of(model, head).items():
            hooks.callback(
                module.register_forward_hook(partial(watch.called, name)).remove
                if gradients
                else module.register_forward_pre_hook(partial(watch.linear, name)).remove
            )
        for module in embeddings_of(model) if gradients else ():
            hooks.callback(module.register_forward_hook(lambda module, args, output: output.requires_grad_()).remove)
        for name, module in attentions_of(model).items():
            hooks.callback(module.register_forward_pre_hook(partial(watch.attention, name)).remove)
        for name, layer in experts_of(model).items():
            if all_experts:
                hooks.callback(layer.register_forward_pre_hook(partial(watch.layer, name)).remove)
            hooks.callback(layer.experts.register_forward_pre_hook(partial(watch.experts, name)).remove)
            hooks.callback(layer.experts.register_forward_hook(watch.weigh).remove)
        yield


class _Watch:
    """The hooks, which count calls: a schedule may repeat micro-batches at the end, which are not shown."""

    def __init__(self, here: Topology, observer: Observer, batches: int, all_experts: bool, numbers: list[int]) -> None:
        self.here = here
        self.observer = observer
        self.batches = batches
        self.numbers = numbers  # global ones, of this rank's experts
        self.calls: Counter[str] = Counter()
        self.all_experts = all_experts
        self.shows_experts = False  # while this watch itself calls all experts
        self.probabilities: dict[nn.Module, Tensor] = {}

    def counts(self, name: str) -> bool:
        self.calls[name] += 1
        return self.calls[name] <= self.batches

    def linear(self, name: str, module: nn.Module, args: tuple) -> None:
        expert, column = is_expert(name), cut_of(f"{name}.weight") is Axis.OUT
        if not (self.shows_experts if expert and self.all_experts else self.counts(name)):
            return
        if weights := grouped_weights(module):
            self.grouped(name, weights, *args)
            return
        inputs = linear_input(module, args[0])
        if self.observer.whole_sequences and module.config.sequence_parallel and column and not expert:
            inputs = whole(self.here.cut(False), inputs, 0)  # as the module itself is about to do
        self.observer.linear(name, plain(f"{name}.weight", module.weight), inputs)

    def called(self, name: str, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        """Show a call of a linear when the gradient of its outputs is there."""
        outputs = output[0] if isinstance(output, tuple) else output
        if self.counts(name):
            outputs.register_hook(partial(self.gradient, name, module, args))

    def gradient(self, name: str, module: nn.Module, args: tuple, gradient: Tensor) -> None:
        expert = is_expert(name)
        if weights := grouped_weights(module):
            layer, _, linear = name.rpartition(".")
            tokens = args[1].tolist() if isinstance(args[1], Tensor) else list(args[1])
            parts = zip(self.numbers, weights, args[0].split(tokens), gradient.split(tokens), strict=True)
            shown = [(f"{layer}.{number}.{linear}", *part) for number, *part in parts]
        else:
            inputs = linear_input(module, args[0])
            if module.config.sequence_parallel and not expert:
                column = cut_of(f"{name}.weight") is Axis.OUT
                inputs = whole(self.here.cut(False), inputs, 0) if column else inputs
                if gradient.shape[0] != inputs.shape[0]:
                    gradient = whole(self.here.cut(False), gradient, 0)
            shown = [(name, module.weight, inputs, gradient)]
        for one, weight, inputs, its_gradient in shown:
            self.observer.gradient(one, plain(f"{one}.weight", weight), inputs, its_gradient)

    def grouped(
        self, name: str, weights: list[Tensor], inputs: Tensor, tokens: list[int] | Tensor, *others: Any
    ) -> None:
        """Show one call of all experts of this rank as one of each."""
        layer, _, linear = name.rpartition(".")
        parts = inputs.split(tokens.tolist() if isinstance(tokens, Tensor) else list(tokens))
        for number, weight, part in zip(self.numbers, weights, parts, strict=True):
            expert = f"{layer}.{number}.{linear}"
            self.observer.linear(expert, plain(f"{expert}.weight", weight), part)

    def attention(self, name: str, module: nn.Module, args: tuple) -> None:
        if self.counts(name):
            self.observer.attention(name, args[1], args[2])

    def experts(self, name: str, module: nn.Module, args: tuple) -> tuple | None:
        """Show how many tokens each expert is given, and call them with probabilities of 1."""
        if self.shows_experts:
            return None
        hidden, tokens, probabilities, *others = args
        if self.counts(name):
            self.observer.experts(name, tokens)
        if module.config.moe_apply_probs_on_input:
            return None
        self.probabilities[module] = probabilities
        return (hidden, tokens, torch.ones_like(probabilities), *others)

    def weigh(self, module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        """Multiply an expert's outputs by the probabilities that were kept from it."""
        probabilities = self.probabilities.pop(module, None)
        if probabilities is None:
            return None
        out, *others = output
        return ((out * probabilities.unsqueeze(-1)).to(out.dtype), *others)

    def layer(self, name: str, module: nn.Module, args: tuple) -> None:
        """Call every expert of this rank with all tokens that the ranks of its experts have."""
        if not self.counts(f"all of {name}"):
            return
        tokens = whole(self.here.dispatch, args[0].flatten(0, -2), 0)
        ones = tokens.new_ones(tokens.shape[0])
        shown = given_to_experts(module, tokens)
        self.shows_experts = True
        if hasattr(module.experts, "local_experts"):
            for number, expert in zip(self.numbers, module.experts.local_experts, strict=True):
                expert(shown(number), ones)
        else:  # one at a time too, so that the tokens are not held once for each
            every = torch.eye(module.num_local_experts, dtype=torch.int64) * tokens.shape[0]
            for number, counts in zip(self.numbers, every, strict=True):
                module.experts(shown(number), counts, ones)
        self.shows_experts = False
