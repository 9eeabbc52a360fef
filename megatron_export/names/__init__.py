"""The table of architectures: each a module with

RULES     canonical Megatron name -> rule, the whole mapping
SETTINGS  fields of Megatron's TransformerConfig beyond those all architectures share
ONLY      config.json key -> the values that these rules are right for
"""

from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType

from ..errors import ExportError, report
from ..layout import Layout
from ..piece import Axis
from . import llama, qwen2, qwen3
from .dialects import canonical
from .feeding import feeders_of, reads_heads
from .parameters import PADDED, PARAMETERS, cut_of, is_linear_weight, makes_keys
from .shape import rope_settings, shape_of, transformer_settings, unscaled_rope_settings

__all__ = [
    "ARCHITECTURES",
    "Source",
    "architecture_of",
    "canonical",
    "cut_of",
    "feeders_of",
    "is_linear_weight",
    "makes_keys",
    "parameters_of",
    "reads_heads",
    "rope_settings",
    "settings_of",
    "shape_of",
    "unscaled_rope_settings",
]

ARCHITECTURES: dict[str, ModuleType] = {
    "LlamaForCausalLM": llama,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}


@dataclass(frozen=True)
class Source:
    """A canonical parameter of one model: how it is cut and shaped in Megatron, and what it is called in HF."""

    canonical: str
    cut: Axis | None
    shape: tuple[int, ...]
    padded: bool
    layout: Layout
    hf: str
    layer: int | None

    def names(self) -> dict[str, str]:
        """Layout part -> HF tensor name."""
        return {part: self.hf.format(l=self.layer, part=part) for part in self.layout.parts}


def architecture_of(config: dict) -> ModuleType:
    """The table for config.json's architecture; `ExportError` with the known ones when there is none."""
    found = (config.get("architectures") or ["(none)"])[0]
    if found not in ARCHITECTURES:
        near = get_close_matches(found, ARCHITECTURES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ExportError(f"unknown architecture {found!r} in config.json.{hint} Known: {', '.join(ARCHITECTURES)}")
    module = ARCHITECTURES[found]
    report(
        [
            f"config.json: {found} with {key} = {config[key]!r} is not supported; only {allowed[0]!r} is"
            for key, allowed in module.ONLY.items()
            if config.get(key) not in allowed
        ]
    )
    return module


def settings_of(config: dict) -> dict:
    """All fields of Megatron's `TransformerConfig` that config.json decides."""
    return transformer_settings(config) | architecture_of(config).SETTINGS


def parameters_of(config: dict) -> dict[str, Source]:
    """Every parameter that a Megatron model of this config has, in the order in which they are exported.

    Tied models have no output layer: Megatron's duplicate on the last pipeline stage is not a parameter of its own.
    """
    rules = dict(architecture_of(config).RULES)  # first: of an unknown architecture, no key of config.json is known
    shape = shape_of(config)
    if shape.tied:
        del rules["output_layer.weight"]
    per_layer = [name for name in rules if "{l}" in name]
    first = [("embedding.word_embeddings.weight", None)]
    middle = [(name, layer) for layer in range(shape.layers) for name in per_layer]
    last = [(name, None) for name in rules if "{l}" not in name and name != first[0][0]]
    sources = {}
    for name, layer in first + middle + last:
        rule, parameter = rules[name], PARAMETERS[name]
        full = name.format(l=layer)
        sources[full] = Source(
            full, parameter.cut, parameter.shape(shape), name in PADDED, rule.layout(shape), rule.hf, layer
        )
    return sources
