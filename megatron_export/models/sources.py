"""The parameters of one model, from its config.json: how each is cut and shaped in Megatron, and what it is called in HF."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, TypeVar

import torch

from ..common.dtypes import torch_dtypes
from ..common.errors import report
from ..common.piece import Axis
from .architecture import Architecture
from .hf_config import architecture_of, shape_of, text_of
from .layouts import Copies, Layout, even_cut
from .megatron_parameters import EITHER, KEPT, PADDED, PARAMETERS
from .predicting import before_layers
from .rules import Rule
from .shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

Shared = TypeVar("Shared", Layout, Rule)
MOST_PARAMETERS = 100_000  # of all layers and experts: Kimi K2, the largest that is known, has 47,000
MOST_NUMBERS = 1 << 34  # in one of them


@dataclass(frozen=True)
class Stack:
    """Where HF keeps an expert's parts: slice `index` of `count` along the first dim of the tensor `name`."""

    name: str
    index: int
    count: int
    woven: bool


@dataclass(frozen=True)
class Source:
    """A canonical parameter of one model: how it is cut and shaped in Megatron, and what it is called in HF.

    `cut` is None if every rank holds it whole; `either`: some layer specs hold it whole, others cut it.
    """

    canonical: str
    cut: Axis | None
    shape: tuple[int, ...]
    padded: bool
    layout: Layout
    rule: Rule
    layer: int | None = None
    expert: int | None = None
    either: bool = False
    dtype: str = "BF16"
    stack: Stack | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype`, as torch calls it."""
        return torch_dtypes()[self.dtype]

    def names(self) -> Mapping[str, str]:
        """Layout part -> HF tensor name; all who ask share it."""
        return self._names

    @cached_property
    def _names(self) -> dict[str, str]:
        if self.rule.copy:
            return {part: self.rule.copy.format(l=part) if part else self.rule.hf for part in self.layout.parts}
        words = dict(self.rule.words)
        return {
            part: self.rule.hf.format(l=self.layer, e=self.expert, part=words.get(part, part))
            for part in self.layout.parts
        }

    def as_stored(self, wide: frozenset[str]) -> Source:
        """The same in float32, if it stays as the original has it, and `wide` are the HF names of what is float32 there."""
        kept = self.rule.as_stored and wide >= {*self.names().values()}
        return replace(self, dtype="F32") if kept else self

    def share(
        self, rows: int, shape: tuple[int, ...], index: int, count: int
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Which rows of the whole, in its order, and which columns (none of a vector) shard `index` of `count` has; `shape` is the
        shard's. The whole has `rows` rows: a padded vocabulary may have more than config.json means.
        """
        columns = tuple(slice(0, size) for size in self.shape[1:])
        if self.cut is Axis.IN:
            columns = (even_cut(self.shape[1], index, count),)
        elif self.cut and not (self.either and shape == self.shape):
            return self.layout.rows(rows, index, count, shape[0]), columns
        return (slice(0, rows),), columns

    def scaled(self, values: Tensor, factors: Tensor) -> Tensor:
        """Some rows of a part with what each multiplies by times its factor, in float32."""
        factors = factors if values.dim() == 1 else factors.unsqueeze(1)
        return (1 + values.float()) * factors - 1 if self.rule.zero_centred else values.float() * factors

    def factors(self, scaled: Tensor, values: Tensor) -> Tensor:
        """What `scaled` made of a vector's values, for each; NaN where it cannot be known."""
        scaled, values = (1 + scaled, 1 + values) if self.rule.zero_centred else (scaled, values)
        return torch.where(values == 0, torch.nan, scaled / values)

    def copies(self) -> set[str]:
        """The HF names of its copies: of the first name, if it has several."""
        names = self.names()
        if type(self.layout) is Copies:  # `isinstance` of a Protocol asks for all that it has
            return {names[part] for part in self.layout.parts[1:]}
        return {name for part, name in names.items() if part} if self.rule.copy else set()


def parameters_of(config: dict) -> dict[str, Source]:
    """Canonical name -> source of every parameter that a Megatron model of this config has, in the order of the export.

    Tied models have no output layer, and parameters of size 0 (shared experts that a model does not have) are left out.
    `ExportError` for an unknown architecture, and for more parameters or numbers than a model can have.
    """
    # First the architecture: of an unknown one, no key of config.json is known.
    return dict(_parameters_of(architecture_of(config), json.dumps(config, default=str)))


@lru_cache(maxsize=2)  # a base and its draft: each stage of an export asks for them again, and a large model has 50,000
def _parameters_of(architecture: Architecture, text: str) -> dict[str, Source]:
    config = json.loads(text)
    lacking = {name for key, (_, rules) in architecture.where.items() if not text_of(config).get(key) for name in rules}
    rules = {name: rule for name, rule in architecture.rules.items() if name not in lacking}
    shape = shape_of(config)
    first = "embedding.word_embeddings.weight"  # which a draft has not
    inside = [name for name in rules if "{l}" in name]
    heads = [name for name in rules if "{h}" in name and _exists(name, shape)]
    outside = [n for n in rules if not ("{l}" in n or "{h}" in n) and n != first and _exists(n, shape)]
    if shape.tied:
        outside.remove("output_layer.weight")
    layers = {name: set(PARAMETERS[name].layers(shape)) for name in inside}
    report(_too_large(shape, {name: len(layers[name]) if name in layers else 1 for name in rules}))
    sources = [_source(first, rules[first], shape)] if first in rules else []
    for layer in shape.every:
        here = [name for name in inside if layer in layers[name] and _exists(name, shape)]
        here = [name for name in here if name.replace("{l}", str(layer)) not in rules]  # which are of one layer
        own = {name: _of_layer(rules[name], layer, shape, architecture) for name in here}
        sources += [_source(name, own[name], shape, layer) for name in here if "{e}" not in name]
        experts = [name for name in here if "{e}" in name]
        of_first = {name: _source(name, own[name], shape, layer, 0) for name in experts}
        sources += [_of_expert(of_first[name], name, n) for n in range(shape.experts) for name in experts]
    sources += [_source(name, rules[name], shape) for name in outside]
    sources += [_of_head(name, rules[name], shape, head) for head in range(shape.medusa) for name in heads]
    return {source.canonical: source for source in sources}


def _of_layer(rule: Rule, layer: int, shape: ModelShape, architecture: Architecture) -> Rule:
    """The rule as it is in a layer: those that predict one more token may have names of their own."""
    before = before_layers(architecture)
    if layer < shape.layers or not architecture.predicting or not rule.hf.startswith(before):
        return rule
    return _shared(
        replace(rule, hf=f"{architecture.predicting}{layer - shape.layers}{rule.hf.removeprefix(before + '{l}')}")
    )


def stored_names(config: dict) -> frozenset[str]:
    """The HF names of the tensors that are written in float32 where the original has them so."""
    kept = (source for source in parameters_of(config).values() if source.rule.as_stored)
    return frozenset(name for source in kept for name in source.names().values())


def copied_prefixes(config: dict) -> tuple[str, ...]:
    """Prefixes of the names of tensors that are copied from the original model as they are."""
    return architecture_of(config).copied


def head_of(config: dict) -> str:
    """The HF name of the output layer, which a tied model does not have; "" of heads that have one each."""
    rule = architecture_of(config).rules.get("output_layer.weight")
    return rule.hf if rule else ""


def shared_tensors(config: dict) -> dict[str, str]:
    """HF name of a tensor that Megatron takes another one for -> the HF name of that one.

    They are the output layer of a tied model, and the copies of embedding and output layer that each layer of MTP has.
    """
    sources = parameters_of(config)
    shared = {
        copy: next(name for name in source.names().values() if name not in source.copies())
        for source in sources.values()
        for copy in sorted(source.copies())
    }
    tied = {head_of(config): sources["embedding.word_embeddings.weight"].rule.hf} if shape_of(config).tied else {}
    return shared | tied


def _too_large(shape: ModelShape, layers: dict[str, int]) -> list[str]:
    """Why a plan would take hours: more or larger parameters than any model has; `layers`: name -> how many layers have it."""
    count = sum(number * (shape.experts if "{e}" in name else 1) for name, number in layers.items())
    sizes = {name: prod(PARAMETERS[name].shape(shape)) for name, number in layers.items() if number}
    means = {f"{count:,} parameters in {len(shape.every)} layers of {shape.experts} experts": (count, MOST_PARAMETERS)}
    means |= {f"{size:,} numbers in {name}": (size, MOST_NUMBERS) for name, size in sizes.items()}
    way_out = "Give the config.json that belongs to these weights"
    too_large = ((what, most) for what, (number, most) in means.items() if number > most)
    return [f"config.json means {what}, more than {most:,}. {way_out}" for what, most in too_large]


def _exists(name: str, shape: ModelShape) -> bool:
    if name.endswith("linear_q_proj.weight"):
        return not shape.q_lora  # latent attention makes its queries in two steps, or in this one
    if name.endswith("q_layernorm.weight") and shape.kv_lora:
        return bool(shape.q_lora)
    return 0 not in PARAMETERS[name].shape(shape)


def _source(name: str, rule: Rule, shape: ModelShape, layer: int | None = None, expert: int | None = None) -> Source:
    parameter = PARAMETERS[name]
    return Source(
        canonical=name.format(l=layer, e=expert, h="{h}"),
        cut=Axis.OUT if rule.cut_shape else parameter.cut,
        shape=(rule.cut_shape or parameter.shape)(shape),
        padded=name in PADDED,
        layout=_shared(rule.layout(shape)),
        rule=rule,
        layer=layer,
        expert=expert,
        either=any(f".{module}." in name for module in EITHER),
        dtype=KEPT.get(name.rpartition(".")[2], "BF16"),
        stack=Stack(rule.stack.format(l=layer), expert, shape.experts, rule.woven) if rule.stack else None,
    )


def _of_expert(first: Source, name: str, expert: int) -> Source:
    """A parameter of one expert, from that of the first of its layer: but for names they are the same."""
    return Source(
        name.format(l=first.layer, e=expert),
        first.cut,
        first.shape,
        first.padded,
        first.layout,
        first.rule,
        first.layer,
        expert,
        first.either,
        first.dtype,
        replace(first.stack, index=expert) if first.stack else None,
    )


@cache
def _shared(made: Shared) -> Shared:
    """One for all that are equal, so that who asks whether two are can compare identities: a large model has 50,000."""
    return made


def _of_head(name: str, rule: Rule, shape: ModelShape, head: int) -> Source:
    """A parameter of one of Medusa's heads, whose output layer HF numbers as if it were one more block."""
    hf = rule.hf.replace("{h}", str(head)).replace("{b}", str(shape.blocks))
    return replace(_source(name, replace(rule, hf=hf), shape), canonical=name.replace("{h}", str(head)))


def part_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Layout part -> the shape that config.json means, without the copies of other tensors."""
    shapes = dict(split_shapes(source.layout, source.shape))
    if not (copies := source.copies()):
        return shapes
    return {part: shape for part, shape in shapes.items() if source.names()[part] not in copies}


@cache
def split_shapes(
    layout: Layout, shape: tuple[int, ...], index: int = 0, count: int = 1
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The parts of shard `index` of `count`, which has this shape, and their shapes."""
    return tuple((part, (rows, *shape[1:])) for part, rows in layout.part_rows(shape[0], index, count).items())


def expected_shapes(sources: Iterable[Source]) -> dict[str, tuple[int, ...]]:
    """HF tensor name -> the shape that config.json means it to have."""
    found, known = {}, {}
    for source in sources:
        key = id(source.layout), source.shape  # which the experts of a layer have in common
        if key not in known:
            known[key] = [shape for _, shape in split_shapes(source.layout, source.shape)]
        if source.stack:
            out, *inputs = known[key][0]
            found[source.stack.name] = (source.stack.count, *inputs, out * len(known[key]))
            continue
        found.update(zip(source.names().values(), known[key], strict=True))
    return found
