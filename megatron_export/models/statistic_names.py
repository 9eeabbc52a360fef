"""The names of calibration statistics; only this file makes or parses them. In memory they begin with a canonical module:

    {linear}.input_amax                float32 []             the largest |input|; of the output layer where it was asked for
    {linear}.input_channel_amax        float32 [in]           where an AWQ format was measured, as all that follows
    {linear}.pre_quant_scale.{search}  float32 [in]           the vector that the search chose
    {linear}.alpha.{search}            float32 []             and its alpha,
    {linear}.losses.{search}           float64 [11]           among the losses of all alphas
    {linear}.clip.{search}[.{part}]    uint8 [out, in/group]  with clipping, for int4: codes of its groups' ratios, by layout part
    {linear}.clip_ratio.{search}       float32 []             with clipping, for nvfp4
    {linear}.weight_amax               float32 []             of ModelOpt, never on disk: what the weight is quantized with
    {linear}.sensitivity.{format}      float64 []             nats per token that the format costs there: calibration/sensitivity.py
    {experts}.tokens                   int64 [experts]        how many tokens each expert of a layer was given
    {attention}.k_amax, .v_amax        float32 []             the largest |key| and |value|, for the KV cache
    {attention}.v_channel_amax         float32 [rows of v]

The experts of a layer share one name without a number, but for their clipping. A search is `int4_g128`, `int4_g64`, `nvfp4`, or,
for o_proj under grouped queries, `nvfp4_shared`. On disk, names begin with an HF module: a fused linear's statistics stand under
each of its HF names, codes of a part under the name of that part, and those of keys and values below k_proj and v_proj.
"""

import re
from collections.abc import Callable

from .megatron_parameters import HEAD, is_expert, is_linear_weight, makes_keys, pooled
from .predicting import is_unseen
from .sources import parameters_of

Homes = dict[str, dict[str, str]]  # canonical module -> the HF module of each of its layout parts

_INT4, _NVFP4 = r"int4_g(?:128|64)", r"nvfp4(?:_shared)?"
_KINDS = (
    *("input_amax", "input_channel_amax", "k_amax", "v_amax", "v_channel_amax", "tokens"),
    rf"(?:pre_quant_scale|alpha|losses)\.(?:{_INT4}|{_NVFP4})",
    rf"clip\.{_INT4}(?:\.\w+)?",
    rf"clip_ratio\.{_NVFP4}",
    r"sensitivity\.\w+",
)
_KEY = re.compile(rf"(.+?)\.({'|'.join(_KINDS)})")


def input_key(linear: str) -> str:
    """The amax of a linear's input; the experts of a layer have one."""
    return f"{pooled(linear)}.input_amax"


def weight_key(linear: str) -> str:
    """The amax that a linear's weight is quantized with, if ModelOpt gave one."""
    return f"{linear}.weight_amax"


def kv_keys(attention: str) -> tuple[str, str]:
    """The amax of the keys and that of the values of an attention."""
    return f"{attention}.k_amax", f"{attention}.v_amax"


def channels(key: str) -> str:
    """The statistic by channel whose maximum is the amax `key`: `x_amax` -> `x_channel_amax`."""
    return key.removesuffix("amax") + "channel_amax"


def _of_search(kind: str) -> Callable[[str, str], str]:
    """A function (linear, search) -> the statistic of this kind that the search found."""
    return lambda linear, search: f"{linear}.{kind}.{search}"


vector_key, alpha_key, losses_key = _of_search("pre_quant_scale"), _of_search("alpha"), _of_search("losses")
ratio_key = _of_search("clip_ratio")


def sensitivity_key(linear: str, format: str) -> str:
    """What a format costs in a linear; the experts of a layer have one. `format` is the name with its options (`measured_as`)."""
    return f"{pooled(linear)}.sensitivity.{format}"


def codes_key(linear: str, search: str, part: str) -> str:
    """The codes of the ratios that the amaxes of a layout part's groups are clipped to; `part` is "" if there is only one."""
    return f"{linear}.clip.{search}.{part}".rstrip(".")


def tokens_key(experts: str) -> str:
    """How many tokens each expert of a layer was given."""
    return f"{experts}.tokens"


def experts_module(canonical: str) -> str:
    """The module of all experts of a layer, from a name in one of them; the name may be canonical or HF's."""
    return canonical.partition(".experts.")[0] + ".experts"


def module_of(key: str) -> str:
    """The canonical module that a statistic is of."""
    return _KEY.fullmatch(key)[1]


def layer_of(key: str) -> str:
    """The number of the layer that a statistic is of."""
    return key.split(".")[2]


def alpha_of(vector: str) -> str:
    """The statistic of the alpha that a vector was made with, from that of the vector."""
    return vector.replace(".pre_quant_scale.", ".alpha.")


def is_vector(key: str, search: str) -> bool:
    """Whether a statistic is a vector that this search chose, shared or not."""
    return f".pre_quant_scale.{search}" in key


def _has(words: str) -> Callable[[str], bool]:
    """A function of a statistic: whether its name has these words."""
    return lambda key: words in f"{key}."


is_alpha, is_tokens, is_amax = _has(".alpha."), _has(".tokens."), _has("amax.")
is_sensitivity = _has(".sensitivity.")
is_codes, is_clipping = _has(".clip."), _has(".clip")  # the latter: codes or a ratio


def hf_keys(config: dict) -> dict[str, list[str]]:
    """Name in memory -> names on disk, of the statistics that every file has."""
    keys = []
    for name in parameters_of(config):
        if is_unseen(name, config):
            continue
        keys += [input_key(name.removesuffix(".weight"))] if is_linear_weight(name) else []
        keys += kv_keys(name.rsplit(".", 2)[0]) if makes_keys(name) else []
        keys += [tokens_key(experts_module(name))] if is_expert(name) else []
    homes = homes_of(config)
    return {key: on_disk(key, homes) for key in dict.fromkeys(keys)}


def homes_of(config: dict) -> Homes:
    """Canonical module -> HF modules by layout part; an attention has those of its keys and values."""
    homes = {}
    for name, source in parameters_of(config).items():
        if name == HEAD:
            homes[name.removesuffix(".weight")] = {"": source.rule.hf.removesuffix(".weight")}
        if is_linear_weight(name):
            parts = {part: pooled(hf).removesuffix(".weight") for part, hf in source.names().items()}
            homes[pooled(name).removesuffix(".weight")] = parts
            if is_expert(name):  # each has its own clipping
                own = {part: hf.removesuffix(".weight") for part, hf in source.names().items()}
                homes[name.removesuffix(".weight")] = own
                homes[experts_module(name)] = {"": next(iter(parts.values())).rpartition(".")[0]}
            if makes_keys(name):
                homes[name.rsplit(".", 2)[0]] = {part: parts.get(part, parts.get("")) for part in "kv"}
    return homes


def on_disk(key: str, homes: Homes) -> list[str]:
    """The names on disk of a statistic, from its name in memory."""
    module, kind = _KEY.fullmatch(key).groups()
    parts = homes[module]
    if kind[:2] in ("k_", "v_"):
        return [f"{parts[kind[0]]}.{kind}"]
    stem, _, part = kind.rpartition(".")
    if kind.startswith("clip.") and part in parts:
        return [f"{parts[part]}.{stem}"]
    return [f"{hf}.{kind}" for hf in parts.values()]


def owners_of(homes: Homes) -> dict[str, tuple[str, str]]:
    """HF module -> its canonical module, and its layout part in that."""
    return {
        hf: (module, part)
        for module, parts in homes.items()
        if not module.endswith(".self_attention")
        for part, hf in parts.items()
    }


def in_memory(hf: str, owners: dict[str, tuple[str, str]]) -> str | None:
    """The name in memory of a statistic on disk; None for a name that is no statistic of this model."""
    found = _KEY.fullmatch(hf)
    if found is None or found[1] not in owners:
        return None
    (module, part), kind = owners[found[1]], found[2]
    if kind[:2] in ("k_", "v_"):
        if part not in ("", kind[0]) or not makes_keys(f"{module}.weight"):  # no part: one tensor of q, k and v
            return None
        module = module.rpartition(".")[0]
    by_part = f".{part}" if kind.startswith("clip.") and part else ""
    return f"{module}.{kind}{by_part}"
