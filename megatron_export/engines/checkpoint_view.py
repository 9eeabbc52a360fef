"""A checkpoint as engines see it before they read weights: two configs, and names, dtypes and shapes.

Made from a folder or from a plan. Engines join linears: a `Group` is what becomes one module of theirs.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

FUSED = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa")),
    *(("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")),  # of linear attention
)
_SIBLINGS = {part: parts for parts in FUSED for part in parts}
_ROUTERS = ("gate", "router")
_STACKS = ("gate_up_proj", "down_proj")
_OF_OPENAI = {
    "blocks": "weight",
    "scales": "weight_scale",
}  # what follows a stack's name in MXFP4 -> what that is elsewhere
_NOT_LINEAR = ("eh_proj",)
_LINEAR = ("fc", "wq_b", "wk")  # of drafts, of indexers
_SEES = ("vision", "multi_modal", "visual")
_OF_MODELS = ("model.", "language_model.", "backbone.")  # no tensor that tells a draft is called so
SCALES = ("weight_scale", "weight_scale_2", "weight_scale_inv", "input_scale", "pre_quant_scale")
_OF_LINEAR = frozenset(("weight", *SCALES))
_IN_CODES = ("F8_E4M3", "U8", "I8")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Header(NamedTuple):
    """What a safetensors file says of a tensor; the dtype as it spells it."""

    dtype: str
    shape: tuple[int, ...]


Module = dict[str, Header]


@dataclass
class Group:
    """What becomes one module of an engine: a linear, several that it joins, the experts of a layer, the output layer.

    kind     linear, experts, stack (experts in one tensor), head or router
    parent   the HF module around it; for experts, their container
    parts    the last words of the members' names, in the engines' order
    members  HF module -> its tensors
    mtp      whether it is in a layer that predicts one more token
    """

    kind: str
    parent: str
    parts: tuple[str, ...]
    members: dict[str, Module] = field(default_factory=dict)
    mtp: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the first member is stored quantized."""
        return is_quantized(next(iter(self.members.values())))


@dataclass(frozen=True)
class View:
    """What an engine finds in the files that it opens.

    modules  HF module -> suffix -> tensor; modules with the same tensors share a dict
    groups   the linears among the modules
    kv       name of a scale of the KV cache below its attention -> the attentions that have it
    expected what config.json means: HF tensor -> shape
    """

    tensors: dict[str, Header]
    modules: dict[str, Module]
    groups: tuple[Group, ...]
    kv: dict[str, list[str]]
    expected: dict[str, tuple[int, ...]]

    @cached_property
    def unfit(self) -> tuple[tuple[str, Header | None], ...]:
        """The tensors, other than codes, that are not there (None) or have another shape than the model that config.json means."""
        found = []
        for name, shape in self.expected.items():
            header = self.tensors.get(name) or self.modules.get(name, {}).get("weight")  # of a stack in blocks
            if header is None or (header.shape != shape and header.dtype not in _IN_CODES):
                found.append((name, header))
        return tuple(found)

    @cached_property
    def means(self) -> dict[str, tuple[int, ...]]:
        """Linear, or stack of experts -> the shape of its weight in that model."""
        return {name.removesuffix(".weight"): shape for name, shape in self.expected.items()}

    @cached_property
    def others(self) -> tuple[str, ...]:
        """The modules that are no linears of that model with the tensors of a linear."""
        return tuple(
            module
            for module, tensors in self.modules.items()
            if f"{module}.weight" not in self.expected or not tensors.keys() <= _OF_LINEAR
        )


@dataclass(frozen=True)
class CheckpointView:
    """config, quant  config.json, and hf_quant_config.json or None
    files, index   safetensors file -> its tensors; the index's tensor -> file, or None
    expected  HF tensor -> shape in the model that config.json means, not quantized; None for an unknown architecture
    copied    prefixes of the names of tensors that stay as they are
    """

    config: dict
    quant: dict | None
    files: dict[str, dict[str, Header]]
    index: dict[str, str] | None = None
    expected: dict[str, tuple[int, ...]] | None = None
    copied: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """The first of config.json's `architectures`, '' for none."""
        found = self.config.get("architectures")
        return str(found[0]) if isinstance(found, list) and found else ""

    @property
    def text(self) -> dict:
        """The part of config.json that describes the decoder."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.config.get("tie_word_embeddings", self.text.get("tie_word_embeddings", False)))

    @property
    def layers(self) -> int:
        """Layers of the decoder, without those that predict one more token."""
        return self.number("num_hidden_layers")

    @property
    def caching(self) -> int:
        """Layers of the decoder that have keys and values to cache: those of linear attention and Mamba have none."""
        keys = {
            name for name in self.expected or () if name.endswith(".k_proj.weight") and not is_mtp(name, self.layers)
        }
        return len(keys) or self.layers

    @property
    def latent(self) -> bool:
        """Whether its attention is latent."""
        return bool(self.text.get("kv_lora_rank"))

    @property
    def experts(self) -> int:
        """Routed experts of a layer; 0 for none."""
        keys = ("num_experts", "n_routed_experts", "num_local_experts")
        return next((found for key in keys if (found := self.number(key))), 0)

    def number(self, key: str) -> int:
        """A whole number of the decoder's config, 0 if it has none of this key."""
        found = self.text.get(key)
        return found if isinstance(found, int) else 0

    @cached_property
    def inline(self) -> dict | None:
        """config.json's `quantization_config`."""
        found = self.config.get("quantization_config", self.text.get("quantization_config"))
        return found if isinstance(found, dict) else None

    @cached_property
    def nested(self) -> dict | None:
        """`quantization` of hf_quant_config.json."""
        found = (self.quant or {}).get("quantization")
        return found if isinstance(found, dict) else None

    @cached_property
    def whole(self) -> View:
        """What an engine finds that opens all files."""
        return self._view(self.files)

    @cached_property
    def outside(self) -> frozenset[str]:
        """The tensors that are in no model of a base by their names, but perhaps in a draft."""
        return frozenset(name for name in self.whole.tensors if not name.startswith(_OF_MODELS))

    @cached_property
    def indexed(self) -> View:
        """What an engine finds that opens the files of the index; all files if there is none."""
        named = set((self.index or {}).values())
        return self.whole if self.index is None or named >= set(self.files) else self._view(named & set(self.files))

    def _view(self, files: Iterable[str]) -> View:
        tensors: dict[str, Header] = {}
        for file in sorted(files):
            tensors |= self.files[file]
        modules, kv = _modules(tensors)
        others = _SEES + self.copied
        linears = {name: module for name, module in modules.items() if not name.startswith(others)}
        return View(tensors, modules, tuple(_groups(linears, self.layers)), kv, self.expected or {})


def is_mtp(name: str, layers: int) -> bool:
    """Whether an HF tensor or module is in a layer that predicts one more token: behind the `layers` of the decoder, or of mtp."""
    if name.startswith("mtp."):
        return True
    found = _LAYER.search(name)
    return bool(found) and int(found[1]) >= layers > 0


def is_quantized(module: Module) -> bool:
    """Whether a linear is stored in codes."""
    return module["weight"].dtype in _IN_CODES or "weight_scale" in module


def _modules(tensors: dict[str, Header]) -> tuple[dict[str, Module], dict[str, list[str]]]:
    modules: dict[str, Module] = {}
    kv: dict[str, list[str]] = {}
    usual: set[str] = set()  # suffixes
    for name, header in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in usual:
            pass
        elif suffix in ("k_scale", "v_scale"):
            parent, _, last = module.rpartition(".")
            at, spelled = (parent, f"{last}.{suffix}") if last.endswith("_proj") else (module, suffix)
            kv.setdefault(spelled, []).append(at)
            continue
        elif not suffix.startswith(_STACKS):
            usual.add(suffix)
        else:
            stack = next(stack for stack in _STACKS if suffix.startswith(stack))
            last = suffix.removeprefix(stack).removeprefix("_") or "weight"
            module, suffix = f"{module}.{stack}", _OF_OPENAI.get(last, last)
        if module not in modules:
            modules[module] = {}
        modules[module][suffix] = header
    known: dict[tuple, Module] = {}
    return {name: known.setdefault(tuple(module.items()), module) for name, module in modules.items()}, kv


def _groups(modules: dict[str, Module], layers: int) -> Iterable[Group]:
    groups: dict[tuple[str, ...], Group] = {}
    for name, module in modules.items():
        if "weight" not in module or len(module["weight"].shape) < 2:
            continue
        parent, _, last = name.rpartition(".")
        container, inside, _ = name.partition(".experts.")
        key: tuple[str, ...] = (parent, last)
        if inside:
            stack = len(module["weight"].shape) > 2
            key = (f"{container}.experts", last if stack else "")
            group = Group("stack" if stack else "experts", key[0], (last,) if stack else ())
        elif last == "lm_head":
            group = Group("head", parent, (last,))
        elif last in _ROUTERS:
            group = Group("router", parent, (last,))
        elif (
            last in _LINEAR
            or last.startswith("in_proj_")
            or (last.endswith(("_proj", "_proj_with_mqa")) and last not in _NOT_LINEAR)
        ):
            parts = _SIBLINGS.get(last, (last,))
            parts = parts if all(f"{parent}.{part}" in modules for part in parts) else (last,)
            key = (parent, *parts)
            group = Group("linear", parent, parts)
        else:
            continue
        found = groups.setdefault(key, group)
        if not found.members:
            found.mtp = is_mtp(name, layers)
        found.members[name] = module
    return groups.values()
