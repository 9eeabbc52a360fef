"""Layers that predict one more token: what HF calls them, how many there are, a config.json without them."""

import re
from collections.abc import Iterable

from .architecture import Architecture
from .hf_config import architecture_of, shape_of, text_of
from .megatron_parameters import makes_keys
from .registry import known


def without_mtp(config: dict) -> dict:
    """The config.json of the same model without layers that predict one more token."""
    architecture, usual = known(config), "num_nextn_predict_layers"
    own = architecture.keys.get(usual, usual) if architecture else usual
    changed = config | {own: 0} if own in config else config
    inner = config.get("text_config")
    return changed | {"text_config": inner | {own: 0}} if isinstance(inner, dict) and own in inner else changed


def with_mtp(config: dict, names: Iterable[str]) -> dict:
    """The same where config.json may leave out how many layers predict one more token, and does, if `names` of tensors in the
    model's files say it (Qwen3-Next).
    """
    architecture, usual = architecture_of(config), "num_nextn_predict_layers"
    own, inner = architecture.keys.get(usual), config.get("text_config")
    if own is None or not architecture.predicting or text_of(config).get(usual) is not None:
        return config
    before = architecture.predicting
    count = len({name.removeprefix(before).partition(".")[0] for name in names if name.startswith(before)})
    if not count:
        return config
    return config | ({"text_config": inner | {own: count}} if isinstance(inner, dict) else {own: count})


def is_mtp(canonical: str, config: dict) -> bool:
    """Whether a canonical parameter is in a layer that predicts one more token."""
    found = re.match(r"decoder\.layers\.(\d+)\.", canonical)
    return bool(found) and int(found[1]) >= shape_of(config).layers


def keeps_keys(canonical: str, config: dict) -> bool:
    """Whether scales of a KV cache stand beside a parameter."""
    return makes_keys(canonical) and not is_unseen(canonical, config)


def is_unseen(canonical: str, config: dict) -> bool:
    """Whether a canonical parameter is in a layer that calibration does not run."""
    return architecture_of(config).mtp_unseen and is_mtp(canonical, config)


def mtp_prefixes(config: dict, names: Iterable[str] = ()) -> tuple[str, ...]:
    """Prefixes of the HF names in layers that predict one more token: those that config.json means, and those among `names`."""
    architecture, shape = architecture_of(config), shape_of(config)
    if own := own_of_mtp(architecture):
        return own if shape.mtp or any(name.startswith(own) for name in names) else ()
    before = before_layers(architecture)
    layers, joins = set(shape.predicting), re.compile(rf"{re.escape(before)}(\d{{1,4}})\.eh_proj\.weight")
    layers |= {int(found[1]) for name in names if (found := joins.fullmatch(name))} - set(range(shape.layers))
    return tuple(f"{before}{layer}." for layer in sorted(layers))


def own_of_mtp(architecture: Architecture) -> tuple[str, ...]:
    """What HF names begin with in layers that predict one more token, where those have names of their own."""
    return (f"{architecture.predicting.partition('.')[0]}.",) if architecture.predicting else ()


def is_beyond(name: str, config: dict) -> bool:
    """Whether an HF name is in a layer after the decoder's, where layers that predict one more token are."""
    architecture = architecture_of(config)
    if own := own_of_mtp(architecture):
        return name.startswith(own)
    found = re.match(rf"{re.escape(before_layers(architecture))}(\d+)\.", name)
    return bool(found) and int(found[1]) >= shape_of(config).layers


def before_layers(architecture: Architecture) -> str:
    """What the HF names of the decoder's layers begin with, before their numbers."""
    rules = architecture.rules
    usual, head = (f"decoder.layers.{{l}}.{name}.weight" for name in ("self_attention.linear_proj", "lm_head"))
    return rules[usual if usual in rules else head].hf.partition("{l}")[0]
