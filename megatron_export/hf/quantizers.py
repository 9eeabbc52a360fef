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

from ..models import Source
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


def by_part(sources: dict[str, Source], quantizers: Quantizers, places: Places) -> list[Quantizers]:
    """The quantizers of the first layout part of each canonical module, of the second, and so on, by canonical name.

    Those of no module that a format may quantize are among the first, under their names in memory.
    """
    owned: dict[tuple[str, str, str], dict[str, str]] = {}  # module, tensor in it, expert -> kind -> name in memory
    for name in quantizers:
        if found := _KIND.fullmatch(name):
            owner, stem, kind, plural, numbers = found.groups()
            expert, rest = re.fullmatch(r"(\.\d+)?(.*)", numbers).groups() if plural else ("", numbers)
            owned.setdefault((owner or "", stem or "", expert or ""), {})[f"{kind}{rest}"] = name
    tables: list[Quantizers] = [{}, {}, {}]
    taken = set()

    def give(table: Quantizers, module: str, owner: tuple[str, str, str]) -> None:
        for kind, mine in owned.get(owner, {}).items():
            table[f"{module}.{kind}"] = quantizers[mine]
            taken.add(mine)

    for name, source in sources.items():
        if not name.endswith(".weight") or len(source.shape) < 2:
            continue
        for table, place in zip(tables, homes_of(source, places).values(), strict=False):
            tail, module = place.name.removesuffix(".weight"), name.removesuffix(".weight")
            owner, _, stem = tail.rpartition(".")
            if source.stack or place.experts:
                give(table, module, (owner, stem, ""))
                give(table, module, (owner, stem, f".{source.expert}"))
            else:
                give(table, module, (tail, "", ""))
    for attention, place in _attentions(sources, places).items():
        give(tables[0], attention, (place, "", ""))
    tables[0] |= {name: found for name, found in quantizers.items() if name not in taken}
    return tables


def _attentions(sources: dict[str, Source], places: Places) -> dict[str, str]:
    """Canonical attention -> its module in memory."""
    ends = ".self_attention.linear_proj.weight"
    return {
        name.rpartition(".linear_proj")[0]: homes_of(source, places)[""].name.rsplit(".", 2)[0]
        for name, source in sources.items()
        if name.endswith(ends) and homes_of(source, places)
    }
