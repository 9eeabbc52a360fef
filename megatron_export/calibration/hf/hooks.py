"""Shows an observer what the modules of a running transformers model are called with: the only file that hooks transformers'.

Of modules that read one input, the first is watched, and shown as the linear that they are in Megatron. Keys and values are seen
where the model gives them to its cache: rotated, and not yet repeated for each query.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...models import is_expert
from ..observer import Observer
from .experts import Stack, instead
from .linears import Fused, InStack, Linears


@contextmanager
def watching(
    model: nn.Module, linears: Linears, observer: Observer, all_experts: bool, head: bool, gradients: bool
) -> Iterator["Watch"]:
    """While open, `observer` sees the calls of every linear, with `head` of the output layer too (calibration/subject.py)."""
    watch = Watch(observer, all_experts)
    with ExitStack() as hooks:
        for name in linears.held if head else linears:
            one = linears.held[name]
            if isinstance(one, Fused):
                for part, module in one.modules.items() if gradients else [*one.modules.items()][:1]:
                    hooks.callback(
                        module.register_forward_hook(partial(watch.called, one, part)).remove
                        if gradients
                        else module.register_forward_pre_hook(partial(watch.linear, one)).remove
                    )
        if gradients:
            embedded = lambda module, args, output: output.requires_grad_()  # noqa: E731
            hooks.callback(model.get_input_embeddings().register_forward_hook(embedded).remove)
        for layer, experts in linears.experts().items():
            if isinstance(experts[0][0], InStack):
                hooks.enter_context(instead(model, layer, Stack(experts), watch, gradients))
            elif not gradients:
                block = model.get_submodule(_parent(model, experts[0][0].modules))
                if all_experts:
                    hooks.callback(block.register_forward_pre_hook(partial(watch.layer, experts)).remove)
                after = partial(watch.over, layer, experts)
                hooks.callback(block.register_forward_hook(after, prepend=True).remove)
        yield watch


def _parent(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """The name of the block whose experts, in a list of modules, have these linears."""
    first = next(iter(modules.values()))
    name = next(name for name, module in model.named_modules() if module is first)
    return name.rpartition(".experts.")[0]


class Watch:
    """The hooks."""

    def __init__(self, observer: Observer, all_experts: bool) -> None:
        self.observer, self.all_experts = observer, all_experts
        self.shows_experts = False  # while this watch itself calls all experts
        self.counts: Counter[str] = Counter()  # tokens that the first linear of an expert was given of this batch
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def linear(self, one: Fused, module: nn.Module, args: tuple) -> None:
        if is_expert(one.name):
            if not self.shows_experts:
                self.counts[one.name] += args[0].flatten(0, -2).shape[0]
            if self.shows_experts is not self.all_experts:
                return
        self.observer.linear(one.name, one.weight, args[0])

    def called(self, one: Fused, part: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Show a call of a linear when the gradients of the outputs of all its parts are there."""
        self.inputs[one.name] = args[0].detach()
        output.register_hook(partial(self.gradient, one, part))

    def gradient(self, one: Fused, part: str, gradient: Tensor) -> None:
        found = self.gradients[one.name]
        found[part] = gradient.movedim(-1, 0)
        if len(found) == len(one.modules):
            rows = sum(len(rows) for rows in found.values())
            joined = one.layout.join(found, rows).movedim(0, -1)
            self.observer.gradient(one.name, one.weight, self.inputs.pop(one.name), joined)
            del self.gradients[one.name]

    def layer(self, experts: list[tuple[Fused, Fused]], module: nn.Module, args: tuple) -> None:
        """Call every expert of a layer with all tokens."""
        self.shows_experts = True
        for child in module.experts:
            child(args[0].flatten(0, -2))
        self.shows_experts = False

    def over(
        self, layer: str, experts: list[tuple[Fused, Fused]], module: nn.Module, args: tuple, output: object
    ) -> None:
        """Tell how many tokens experts that are modules of their own were given, and show those that were not called.

        Now, before FSDP2 frees the layer: to gather a weight later takes all ranks, and each has other experts to show.
        """
        counts = [self.counts.pop(first.name, 0) for first, _ in experts]
        self.observer.experts(layer, torch.tensor(counts))
        for pair in (pair for pair, count in zip(experts, counts, strict=True) if not (count or self.all_experts)):
            for one in pair:
                weight = one.weight
                self.observer.linear(one.name, weight, weight.new_zeros(0, weight.shape[1]))

    def cached(self, key: Tensor, value: Tensor, layer: int) -> None:
        """Show keys and values [batch, groups, sequence, head_dim]."""
        shown = (tensor.permute(2, 0, 1, 3) for tensor in (key, value))
        self.observer.attention(f"decoder.layers.{layer}.self_attention", *shown)


def watched_cache(watch: Watch | None, config: Any = None) -> Any:
    """A cache of transformers that keeps no keys, and shows what it is given; None: that keeps none.

    config  of a model with layers that keep a state: those do
    """
    from transformers import DynamicCache

    class Shown(DynamicCache):
        def update(self, key: Tensor, value: Tensor, layer: int, *others: Any, **more: Any) -> tuple[Tensor, Tensor]:
            if watch:
                watch.cached(key, value, layer)
            return key, value

    return Shown(config=config)
