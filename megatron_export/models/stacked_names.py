"""Where transformers 5 has the experts and the router of a layer in memory: a checkpoint may have been saved so, and is read so.

HF's files have experts one by one, as the tables do; transformers 5 joins them when it loads, to

    model.layers.{l}.mlp.experts.gate_up_proj   [experts, 2 x out, in], rows of gate over those of up
    model.layers.{l}.mlp.experts.down_proj      [experts, out, in]
    model.layers.{l}.mlp.gate.weight            the router, whatever files call it

(of Nemotron-H .mixer, as in its files, and experts.up_proj, as its experts have no gate)
and takes them apart when it saves, unless it is told not to. Source: conversion_mapping.py and core_model_loading.py of 5.23.0.
An architecture whose own files have stacks (Llama 4, GPT-OSS) has them transposed, and no other names.
"""

import re
from dataclasses import dataclass

from .hf_config import shape_of
from .sources import Source, parameters_of

STACK = "gate_up_proj"
_LAYER = re.compile(r".*?\blayers\.\d+")


@dataclass(frozen=True)
class Slice:
    """Of the tensor `name`: expert number `expert` of `experts`, and of its rows block number `part` of `parts`; all of it if
    `experts` is 0.
    """

    name: str
    expert: int = 0
    experts: int = 0
    part: int = 0
    parts: int = 1

    def shape(self, whole: list[int]) -> list[int]:
        """The shape of the slice, of a tensor of this shape; that itself if it cannot be such a stack."""
        if len(whole) != 3 or whole[0] != self.experts or whole[1] % self.parts:
            return whole
        return [whole[1] // self.parts, whole[2]]

    def where(self, rows: int, cut: slice) -> tuple[slice, slice]:
        """Where a tensor whose experts have so many `rows` has the rows `cut` of the slice: along its first two dims."""
        start, stop, _ = cut.indices(rows // self.parts)
        first = self.part * rows // self.parts
        return slice(self.expert, self.expert + 1), slice(first + start, first + stop)


def stacked_names(config: dict, sources: dict[str, Source] | None = None) -> dict[str, Slice]:
    """HF tensor name -> where it is in memory, for the experts and routers of config.json's model, or of these `sources` of it."""
    found, experts = {}, shape_of(config).experts
    for source in (parameters_of(config) if sources is None else sources).values():
        names = source.names()
        if source.stack is None and source.expert is not None:
            only = "up_proj" if source.canonical.endswith("linear_fc1.weight") else "down_proj"
            stack = f"{_block(names)}.experts.{STACK if len(names) > 1 else only}"
            for part, name in enumerate(names.values()):
                found[name] = Slice(stack, source.expert, experts, part, len(names))
        elif source.canonical.endswith(".mlp.router.weight"):
            found |= {name: Slice(f"{_block(names)}.gate.weight") for name in names.values()}
    return found


def _block(names: dict[str, str]) -> str:
    """What the module in a layer that HF tensors are in is called in memory."""
    name = next(iter(names.values()))
    layer = _LAYER.match(name)[0]
    return f"{layer}.mixer" if name.startswith(f"{layer}.mixer.") else f"{layer}.mlp"
