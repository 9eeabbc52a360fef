"""What an engine takes from a checkpoint's configs: which algorithm, for which of its modules, and the KV cache's."""

from collections.abc import Callable
from dataclasses import dataclass, field

from .checkpoint_view import Group
from .exclude_lists import JOINED, Names, Partly
from .verdict import Findings

Matcher = Callable[[Names, str, tuple[str, ...], str], bool]
AlgorithmOf = Callable[
    [Group], str | None
]  # what the engine takes a group for, None if it is not quantized; may raise `Partly`


@dataclass(frozen=True)
class Reading:
    """algorithm  as `tensor_specs.wanted` names it; None if the model is not quantized, '' if each module has its own (mixed)
    where      the key of the list of what is left out, for messages
    names      that list
    layers     HF module -> algorithm, of a mixed model
    group_size inputs that share a scale
    kv         FP8 or NVFP4; None if the config does not quantize the cache
    dialect    modelopt, native, or '' for none
    """

    algorithm: str | None = None
    where: str = ""
    names: Names = field(default_factory=lambda: Names(()))
    layers: dict[str, str] = field(default_factory=dict)
    group_size: int = 16
    kv: str | None = None
    dialect: str = ""


def left_out(reading: Reading, group: Group, matcher: Matcher, latent: str) -> bool:
    """Whether the config leaves a group out, as the engine compares names; `latent` is its name of both projections to latents."""
    if group.kind in ("experts", "stack"):
        return matcher(reading.names, group.parent, (), "")
    joined = group.parts[0] if len(group.parts) == 1 else JOINED.get(group.parts, latent)
    return matcher(reading.names, group.parent, group.parts, joined)


def algorithm_in(reading: Reading, group: Group) -> str | None:
    """The algorithm of a group that is not left out; `Partly` if a mixed model has several for its members."""
    if reading.algorithm:
        return reading.algorithm
    found = {reading.layers[name] for name in group.members if name in reading.layers}
    if not found and group.kind in ("experts", "stack"):
        inside = (algorithm for name, algorithm in reading.layers.items() if name.startswith(f"{group.parent}."))
        return reading.layers.get(group.parent, next(inside, None))
    if len(found) > 1:
        raise Partly
    return found.pop() if found else None


def in_blocks(section: dict, names: tuple[str, ...], findings: Findings) -> Reading | None:
    """What a config with `quant_method` fp8 says; None, and a finding, unless its blocks are 128 x 128 as DeepSeek's are."""
    if section.get("weight_block_size") != [128, 128]:
        findings.add("another", f"no rules about fp8 in blocks of {section.get('weight_block_size')}")
        return None
    kv = kv_of(section.get("kv_cache_scheme"))
    return Reading("blocks", "modules_to_not_convert", Names(names), kv=kv, dialect="native")


def listed(section: dict, *keys: str) -> tuple[str, ...]:
    """The strings in the list at the first of these keys that has one."""
    for key in keys:
        found = section.get(key)
        if isinstance(found, list):
            return tuple(name for name in found if isinstance(name, str))
    return ()


def kv_of(scheme: object) -> str | None:
    """The KV cache's format, FP8 or NVFP4, however a config spells it; another text for any other."""
    if isinstance(scheme, str):
        return scheme.upper()
    if isinstance(scheme, dict) and scheme.get("type") == "float":
        return {"8": "FP8", "4": "NVFP4"}.get(str(scheme.get("num_bits")), "another")
    return "another" if scheme else None


def layers_of(section: dict) -> dict[str, str]:
    """HF module -> algorithm, of a mixed model."""
    found = section.get("quantized_layers")
    layers = found.items() if isinstance(found, dict) else ()
    return {name: str(said.get("quant_algo", "")).upper() for name, said in layers if isinstance(said, dict)}


def size_in(section: dict, default: int) -> int:
    """The group size in a config, else `default`."""
    found = section.get("group_size")
    return found if isinstance(found, int) and found > 0 else default
