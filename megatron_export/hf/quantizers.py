"""The quantizers that ModelOpt put into a transformers model, under the names of the canonical modules that they belong to.

A quantizer is any module with `_num_bits` and `_disabled`. Its names in memory, and whose it is:

    X.weight_quantizer, X.input_quantizer, X.output_quantizer      linear X; `weight_quantizer.0` and `.1` follow one another
    X.experts.gate_up_proj_weight_quantizers.N                     gate and up of expert N (fused experts of transformers 5)
    X.experts.gate_up_proj_input_quantizer                         the input of gate and up of every expert
    X.experts.gate_up_proj_weight_quantizer                        gate and up of every expert (Llama 4, GPT-OSS)
    X.k_bmm_quantizer, X.v_bmm_quantizer                           the KV cache of attention X; also q_bmm and p_bmm

Several HF linears are one canonical linear (q, k, v; gate, up), so there is one table for each layout part.
"""

import re
from typing import Any

from torch import nn

from ..models import is_linear_weight, parameters_of
from .names import Places, homes_of

Attributes = dict[str, Any]
Quantizers = dict[str, Attributes]

_KIND = re.compile(r"(?:(.+?)\.)?(?:(\w+?)_)?((?:weight|input|output|[qkvp]_bmm)_quantizer)(s?)((?:\.\d+)*)")


def quantizers_of(model: nn.Module) -> Quantizers:
    """Name in memory -> attributes and buffers of every quantizer of a model."""
    found = {}
    for name, module in model.named_modules():
        if "_num_bits" in vars(module) and "_disabled" in vars(module):
            buffers = {key: value for key, value in module._buffers.items() if value is not None}
            found[name] = vars(module) | buffers
    return found


def by_part(config: dict, quantizers: Quantizers, places: Places) -> list[Quantizers]:
    """The quantizers of the first layout part of each canonical module, of the second, and so on, by canonical name.

    Those of no module that a format may quantize are among the first, under their names in memory.
    """
    owned: dict[
        tuple[str, str], dict[str, str]
    ] = {}  # module and stem in memory -> the end of a canonical name -> name in memory
    for name in quantizers:
        if found := _KIND.fullmatch(name):
            owner, stem, kind, plural, numbers = found.groups()
            number, rest = re.fullmatch(r"(\.\d+)?(.*)", numbers).groups() if plural else ("", numbers)
            owned.setdefault((owner or "", stem or ""), {})[f"{number or ''}|{kind}{rest}"] = name
    tables: list[Quantizers] = [{}, {}, {}]
    taken = set()
    for name, source in parameters_of(config).items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or len(source.shape) < 2:
            continue
        for table, place in zip(tables, homes_of(source, places).values(), strict=False):
            stacked = bool(source.stack) or place.experts > 0
            tail = place.name.removesuffix(".weight")
            key = tuple(tail.rpartition(".")[::2]) if stacked else (tail, "")
            for what, mine in owned.get(key, {}).items():
                number, _, kind = what.partition("|")
                if number in ("", f".{source.expert}"):
                    table[f"{module}.{kind}"] = quantizers[mine]
                    taken.add(mine)
    for attention, place in _attentions(config, places).items():
        for what, mine in owned.get((place, ""), {}).items():
            tables[0][f"{attention}.{what.partition('|')[2]}"] = quantizers[mine]
            taken.add(mine)
    tables[0] |= {name: found for name, found in quantizers.items() if name not in taken}
    return tables


def linears_of(config: dict, places: Places) -> dict[str, list[str]]:
    """Canonical linear -> names of its layout parts for messages: HF modules."""
    sources = parameters_of(config).values()
    return {
        s.canonical.removesuffix(".weight"): [name.removesuffix(".weight") for name in s.names().values()]
        for s in sources
        if is_linear_weight(s.canonical)
    }


def _attentions(config: dict, places: Places) -> dict[str, str]:
    """Canonical attention -> its module in memory."""
    ends = ".self_attention.linear_proj.weight"
    return {
        name.rpartition(".linear_proj")[0]: homes_of(source, places)[""].name.rsplit(".", 2)[0]
        for name, source in parameters_of(config).items()
        if name.endswith(ends) and homes_of(source, places)
    }
