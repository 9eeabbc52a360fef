"""Experts that transformers keeps in two stacks, computed one by one while they are watched, so that each shows its own inputs.

transformers 5 multiplies all experts of a layer at once, by one of several kernels. Here each expert multiplies its own tokens, in
the same order of operations; outputs are the same but for rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ..observer import Observer
from .linears import InStack, unwoven


class Showing(Protocol):
    """Who is shown the calls."""

    observer: Observer
    all_experts: bool


class Stack:
    """The experts of a layer."""

    def __init__(self, experts: list[tuple[InStack, InStack]]) -> None:
        self.experts = experts
        self.module = experts[0][0].module

    def gated(self, both: Tensor) -> Tensor:
        """What is done between the linears of an expert: [tokens, 2 * width] -> [tokens, width]; without a gate [tokens, width]."""
        if self.experts[0][0].leaf == "up_proj":
            return self.module.act_fn(both)
        if hasattr(self.module, "_apply_gate"):
            return self.module._apply_gate(both)
        if self.experts[0][0].woven:  # GPT-OSS, in transformers 4
            gate, up = both[..., ::2].clamp(max=self.module.limit), both[..., 1::2]
            up = up.clamp(min=-self.module.limit, max=self.module.limit)
            return (up + 1) * (gate * torch.sigmoid(gate * self.module.alpha))
        gate, up = both.chunk(2, dim=-1)
        return self.module.act_fn(gate) * up

    def outputs(self, number: int, inputs: Tensor, show: Callable[[InStack, Tensor, Tensor], None]) -> Tensor:
        """What an expert makes of its tokens, [tokens, hidden] both; `show` gets each linear, its inputs and its outputs."""
        first, second = self.experts[number]
        both = first.product(inputs)
        show(first, inputs, both)
        between = self.gated(both)
        out = second.product(between)
        show(second, between, out)
        return out


@contextmanager
def instead(model: nn.Module, layer: str, stack: Stack, watch: Showing, gradients: bool) -> Iterator[None]:
    """While open, the experts of a layer are computed here, and shown."""
    module, show = stack.module, partial(_gradient if gradients else _inputs, watch.observer)
    every = watch.all_experts and not gradients
    quiet = lambda one, inputs, outputs: None  # noqa: E731

    def routed(hidden: Tensor, chosen: Tensor | None = None, scores: Tensor | None = None, **named: Tensor) -> Tensor:
        given = {"router_indices": chosen, "routing_weights": scores} | named
        chosen = given.pop("top_k_index", given["router_indices"])
        scores = given.pop("top_k_weights", given["routing_weights"])
        flat = hidden.reshape(-1, hidden.shape[-1])
        if every and chosen is not None:
            for number in range(len(stack.experts)):
                stack.outputs(number, flat, show)
        made, counts = torch.zeros_like(flat), []
        for number in range(len(stack.experts)):
            tokens, factors = _given(flat, number, len(stack.experts), chosen, scores)
            counts.append(len(tokens))
            out = stack.outputs(number, flat[tokens], quiet if every else show)
            made = made.index_add(0, tokens, (out * factors).to(made.dtype))
        if not gradients:
            watch.observer.experts(layer, torch.tensor(counts))
        return made.reshape(hidden.shape)

    with ExitStack() as undo:
        undo.enter_context(_replaced(module, routed))
        if every and stack.experts[0][0].turned and not hasattr(module, "gate_up_proj_bias"):
            block = model.get_submodule(_name_of(model, module).rpartition(".")[0])
            undo.callback(block.register_forward_pre_hook(partial(_all_scored, stack, show)).remove)
        yield


def _given(
    flat: Tensor, number: int, count: int, chosen: Tensor | None, scores: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """Which rows an expert is given, and what its outputs are multiplied with.

    Llama 4 says neither, and gives all tokens once for every expert, multiplied by their scores for it: of most that leaves zeros.
    """
    if chosen is None:
        tokens = len(flat) // count
        own = flat[number * tokens : (number + 1) * tokens]
        return number * tokens + own.any(dim=-1).nonzero().squeeze(-1), 1.0
    token, place = torch.where(chosen == number)
    if scores.shape[-1] != chosen.shape[-1]:  # of all experts, as transformers 4 has them for GPT-OSS
        return token, scores[token, number, None]
    return token, scores[token, place, None]


def _all_scored(
    stack: Stack, show: Callable[[InStack, Tensor, Tensor], None], block: nn.Module, args: tuple[Tensor, ...]
) -> None:
    """Show every expert of a layer of Llama 4 all tokens, times their scores for it."""
    tokens = args[0].flatten(0, -2)
    scores = torch.nn.functional.linear(tokens, block.router.weight).float().sigmoid().to(tokens.dtype)
    for number in range(len(stack.experts)):
        stack.outputs(number, tokens * scores[:, number, None], show)


def _inputs(observer: Observer, one: InStack, inputs: Tensor, outputs: Tensor) -> None:
    observer.linear(one.name, one.weight, inputs)


def _gradient(observer: Observer, one: InStack, inputs: Tensor, outputs: Tensor) -> None:
    inputs = inputs.detach()

    def shown(gradient: Tensor) -> None:
        observer.gradient(one.name, one.weight, inputs, unwoven(gradient.T).T if one.woven else gradient)

    outputs.register_hook(shown)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While open, a module computes `forward`."""
    had = "forward" in vars(module)
    before = module.forward
    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = before
        else:
            del module.forward


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module)
