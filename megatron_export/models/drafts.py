"""The drafts that ModelOpt puts beside a model, as children of it: which there are, and which of them are exported.

A draft is exported like a model, into a folder of its own: it has an architecture's table, and a config.json that is made of its
settings and of its base's config.json.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..common.errors import ExportError
from .eagle3 import eagle3_config
from .hf_config import text_of
from .medusa import counts_of, medusa_config, not_medusa
from .megatron_parameters import is_linear_weight

OUT = "Or leave the draft out with --draft-output none"


@dataclass(frozen=True)
class Kind:
    """A kind of draft that is exported.

    config  (config.json's dict of the base's language model, the draft's own settings in such words) -> the draft's config.json
    lacks   names of parameters, below the draft -> why such a draft is not exported; "" if it is
    own     what a module is called below the draft -> its canonical name, where that is another
    before  what the canonical names of all others begin with
    counts  names of parameters, below the draft -> its settings in words of config.json; None if ModelOpt keeps them
    """

    config: Callable[[dict, dict], dict]
    lacks: Callable[[Collection[str]], str]
    own: dict[str, str]
    before: str = ""
    counts: Callable[[Collection[str]], dict] | None = None


def _not_eagle3(names: Collection[str]) -> str:
    if any(name.startswith("parallel_draft_heads.") for name in names):
        return "it has parallel draft heads, which no engine serves. Train it with parallel_draft_step 1"
    if any(name.startswith("hnorm.") for name in names):
        return "it is an EAGLE-MTP draft, which no engine serves. Train an EAGLE-3 draft: with use_aux_hidden_state"
    if not any(name.startswith("fc.") for name in names):
        return "it is an EAGLE draft without hidden states of several layers. Train an EAGLE-3 draft: with use_aux_hidden_state"
    return ""


KINDS: dict[str, Kind] = {
    "eagle_module": Kind(eagle3_config, _not_eagle3, {"eagle_output_layer": "output_layer"}),
    "medusa_heads": Kind(medusa_config, not_medusa, {}, before="decoder.layers.", counts=counts_of),
}
_OTHERS = {
    "dflash_module": "a DFlash or DSpark draft is not exported. Write it with ModelOpt's export_speculative_decoding",
}


def child_of(name: str) -> str:
    """The child of a model that is a draft and has the parameter, buffer or module `name`; "" for what is the model's own."""
    first = name.partition(".")[0]
    return first if first in KINDS or first in _OTHERS else ""


def draft_kind(child: str, names: Collection[str]) -> Kind:
    """The kind of a draft with parameters of these names; `ExportError` for one that is not exported."""
    why = _OTHERS.get(child) or KINDS[child].lacks(names)
    if why:
        raise ExportError(f"{child}: {why}. {OUT}")
    return KINDS[child]


def settings_missing(child: str) -> ExportError:
    """What is raised of a live model whose draft has no settings."""
    return ExportError(
        f"the model has {child} and no eagle_config, which says how the draft computes. ModelOpt's conversion sets it"
    )


def check_single(children: Sequence[str]) -> None:
    """`ExportError` for several drafts in a live model."""
    if len(children) > 1:
        raise ExportError(f"the model has several drafts, {' and '.join(children)}. Remove all but one")


def draft_config(child: str, settings: dict, base: dict) -> dict:
    """The config.json of a draft with these settings, in words of config.json, beside a model with the config.json `base`."""
    return KINDS[child].config(text_of(base), settings)


def canonical_in(kind: Kind, name: str) -> str:
    """The canonical name of a parameter below a draft, from the name that its modules give it."""
    module, _, leaf = name.rpartition(".")
    return f"{kind.own[module]}.{leaf}" if module in kind.own else f"{kind.before}{name}"


def of_linear(quantizer: str) -> bool:
    """Whether a quantizer, by canonical name, is of a linear in a layer. No other one of a draft counts: the rest stays plain."""
    owner = quantizer.rpartition("_quantizer")[0].rpartition(".")[0]
    return is_linear_weight(f"{owner}.weight")
