"""The linears of a transformers model under canonical names: modules that are one in Megatron, and slices of stacks of experts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ...common.shards import plain
from ...hf.dtensors import full_of
from ...hf.names import homes_of, places_in, sources_in
from ...models import HEAD, is_expert, is_linear_weight
from ...models.layouts import Layout
from ...models.sources import Source


@dataclass(frozen=True)
class Fused:
    """Modules that read one input: one canonical linear."""

    name: str
    layout: Layout
    modules: dict[str, nn.Module]  # by layout part

    @property
    def weight(self) -> Tensor:
        """[out, in], joined as Megatron has it."""
        parts = {part: plain(f"{self.name}.weight", full_of(module.weight)) for part, module in self.modules.items()}
        return self.layout.join(parts, sum(len(part) for part in parts.values()))


@dataclass(frozen=True)
class InStack:
    """Both parts of an expert's first linear, or its second one, in a tensor of all experts.

    turned  HF's files have the stack too, [experts, in, out]; else it is [experts, out, in]
    woven   rows of gate and up take turns
    """

    name: str
    module: nn.Module
    leaf: str
    expert: int
    turned: bool
    woven: bool

    @property
    def weight(self) -> Tensor:
        """[out, in], as Megatron has it."""
        rows = self.own
        return unwoven(rows.T) if self.woven else rows if not self.turned else rows.T

    @property
    def own(self) -> Tensor:
        """This expert's slice as it is."""
        return plain(f"{self.name}.weight", full_of(getattr(self.module, self.leaf)[self.expert]))

    def product(self, inputs: Tensor) -> Tensor:
        """What the model multiplies, bias and all: [tokens, out] in the order of its own rows."""
        weight = getattr(self.module, self.leaf)[self.expert]
        product = inputs @ (weight if self.turned else weight.T)
        bias = dict(self.module.named_parameters(recurse=False)).get(f"{self.leaf}_bias")
        return product if bias is None else product + bias[self.expert]


def unwoven(rows: Tensor) -> Tensor:
    """Rows of gate over those of up, of rows that take turns."""
    return torch.cat([rows[::2], rows[1::2]])


class Linears(Mapping[str, Tensor]):
    """Canonical module -> weight, whole, made when it is asked for: of all linears of a model that a format may quantize.

    held     canonical module -> what it is in the model; with the output layer, where that is not the embedding
    sources  canonical name -> parameter, of config.json's model
    """

    def __init__(self, model: nn.Module, config: dict) -> None:
        live = dict(model.named_parameters())
        self.sources = sources_in(config, live)
        places = places_in(config, live)
        self.held: dict[str, Fused | InStack] = {}
        for name, source in self.sources.items():
            homes = homes_of(source, places) if is_linear_weight(name) or name == HEAD else {}
            if homes:
                linear = name.removesuffix(".weight")
                self.held[linear] = _held(model, linear, source, {part: home.name for part, home in homes.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.held[name].weight

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.held if f"{name}.weight" != HEAD)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical module -> [out, in]. Makes nothing."""
        return {name: self.sources[f"{name}.weight"].shape for name in self}

    @property
    def layouts(self) -> dict[str, Layout]:
        """Canonical module -> how its output rows are laid out."""
        return {name: self.sources[f"{name}.weight"].layout for name in self}

    def experts(self) -> dict[str, list[tuple[Fused | InStack, Fused | InStack]]]:
        """Canonical name of a layer's experts -> the first and the second linear of each."""
        found: dict[str, list[tuple[Fused | InStack, Fused | InStack]]] = {}
        for name, one in self.held.items():
            if is_expert(name) and name.endswith(".linear_fc1"):
                layer = name.partition(".experts.")[0] + ".experts"
                found.setdefault(layer, []).append((one, self.held[f"{name.removesuffix('fc1')}fc2"]))
        return found


def _held(model: nn.Module, name: str, source: Source, homes: dict[str, str]) -> Fused | InStack:
    first = next(iter(homes.values()))
    if first.endswith(".weight"):
        owners = {part: model.get_submodule(home.removesuffix(".weight")) for part, home in homes.items()}
        return Fused(name, source.layout, owners)
    owner, _, leaf = first.rpartition(".")
    woven = bool(source.stack) and source.stack.woven and len(homes) > 1
    return InStack(name, model.get_submodule(owner), leaf, source.expert, bool(source.stack), woven)
