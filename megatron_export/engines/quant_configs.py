"""What an engine takes from a checkpoint's configs: which algorithm, for which of its modules, and the KV cache's."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from .checkpoint_view import Group, View
from .exclude_lists import JOINED, Names, Partly, full
from .tensor_specs import MXFP4_EXPERTS, own_group
from .verdict import Findings

MIXED = "MIXED_PRECISION"  # the quant_algo of a model whose modules have several
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
    sizes      HF module -> inputs that share a scale, of a mixed model
    group_size inputs that share a scale; 0 for the algorithm's own number
    kv         FP8 or NVFP4; None if the config does not quantize the cache
    dialect    modelopt, native, or '' for none
    experts    what counts for experts alone
    spelled    HF module -> quant_algo as the config spells it, of a mixed model, where that matters
    """

    algorithm: str | None = None
    where: str = ""
    names: Names = field(default_factory=lambda: Names(()))
    layers: dict[str, str] = field(default_factory=dict)
    group_size: int = 0
    kv: str | None = None
    dialect: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    experts: "Reading | None" = None
    spelled: dict[str, str] = field(default_factory=dict)


def left_out(reading: Reading, group: Group, matcher: Matcher, latent: str) -> bool:
    """Whether the config leaves a group out, as the engine compares names; `latent` is its name of both projections to latents."""
    if group.kind in ("experts", "stack"):
        return matcher(reading.names, group.parent, (), "")
    joined = group.parts[0] if len(group.parts) == 1 else JOINED.get(group.parts, latent)
    return matcher(reading.names, group.parent, group.parts, joined)


def algorithm_in(reading: Reading, group: Group) -> str | None:
    """The algorithm of a group that is not left out; `Partly` if a mixed model has several for its members."""
    if reading.algorithm == MXFP4_EXPERTS and group.kind not in ("experts", "stack"):
        return None
    if reading.algorithm:
        return reading.algorithm
    names = tuple(group.members) or tuple(full(group.parent, part) for part in group.parts)
    found = {reading.layers[name] for name in names if name in reading.layers}
    if not found and group.kind in ("experts", "stack"):
        inside = (algorithm for name, algorithm in reading.layers.items() if name.startswith(f"{group.parent}."))
        return reading.layers.get(group.parent, next(inside, None))
    if len(found) > 1:
        raise Partly
    return found.pop() if found else None


def group_size_in(reading: Reading, group: Group, algorithm: str | None) -> int:
    """How many inputs of a group's linears share a scale: as its entry in a mixed model says, or the config, or as usual."""
    names = (group.parent, *group.members) if reading.sizes else ()
    said = next((reading.sizes[name] for name in names if name in reading.sizes), reading.group_size)
    return said or own_group(algorithm)


def in_blocks(section: dict, names: tuple[str, ...], findings: Findings) -> Reading | None:
    """What a config with `quant_method` fp8 says; None, and a finding, unless its blocks are 128 x 128 as DeepSeek's are."""
    if section.get("weight_block_size") != [128, 128]:
        findings.add("another", f"no rules about fp8 in blocks of {section.get('weight_block_size')}")
        return None
    kv = kv_of(section.get("kv_cache_scheme"))
    return Reading("blocks", "modules_to_not_convert", Names(names), kv=kv, dialect="native")


def of_openai(architecture: str, findings: Findings) -> Reading | None:
    """What a config with `quant_method` mxfp4 says, whatever it lists; None, and a finding, unless it is that of GPT-OSS."""
    if architecture != "GptOssForCausalLM":
        findings.add("another", "no rules about quant_method mxfp4")
        return None
    return Reading(MXFP4_EXPERTS, "modules_to_not_convert", dialect="native")


def inner_section(inline: dict | None) -> dict | None:
    """hf_quant_config.json's section where it stands, producer and all, in config.json: ModelOpt writes drafts so."""
    found = (inline or {}).get("quantization")
    return found if isinstance(found, dict) and by_modelopt(inline) and "quant_method" not in (inline or {}) else None


def by_modelopt(said: dict | None) -> bool:
    """Whether a config names ModelOpt as what made it."""
    producer = (said or {}).get("producer")
    return isinstance(producer, dict) and producer.get("name") == "modelopt"


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


def _entries(section: dict) -> dict[str, dict]:
    found = section.get("quantized_layers")
    layers = found.items() if isinstance(found, dict) else ()
    return {name: said for name, said in layers if isinstance(said, dict)}


def layers_of(section: dict) -> dict[str, str]:
    """HF module -> algorithm, of a mixed model."""
    return {name: str(said.get("quant_algo", "")).upper() for name, said in _entries(section).items()}


def sizes_of(section: dict) -> dict[str, int]:
    """HF module -> group size, of those of a mixed model that say one."""
    return {name: size for name, said in _entries(section).items() if (size := size_in(said))}


def check_entries(layers: dict[str, str], known: Collection[str], view: View, way: str, findings: Findings) -> None:
    """Entries of a mixed model in an algorithm that is not `known`, so that the engine takes the module for bfloat16."""
    stored = {
        name for group in view.groups if group.quantized and not group.mtp for name in (group.parent, *group.members)
    }
    for name, algorithm in layers.items():
        if algorithm not in known and name in stored:
            findings.add("mixed", f"quantized_layers has it in {algorithm or 'no algorithm'}", name, way=way)


def size_in(section: dict) -> int:
    """The group size in a config, 0 for none."""
    found = section.get("group_size")
    return found if isinstance(found, int) and found > 0 else 0
