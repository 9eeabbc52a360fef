"""What the layers of a model are made of: which kinds of blocks each has, as config.json says it.

A layer of HF may have one block (Nemotron-H: a Mamba mixer, an attention, an MLP or experts) or two (attention, then an MLP). Which
parameters a layer has follows from its kinds: models/megatron_parameters.py.
"""

from enum import StrEnum

from ..common.errors import report
from ..common.safe_files import shown


class Kind(StrEnum):
    """A block of a layer; or what it has because it predicts one more token: the join of embedding and hidden state at the start,
    a norm at the end.
    """

    ATTENTION = "attention"
    LINEAR = "linear attention"
    MAMBA = "Mamba"
    MLP = "MLP"
    EXPERTS = "experts"
    JOIN = "join"
    LAST = "last norm"


# What Megatron's hybrid models call them.
LETTERS = {Kind.MAMBA: "M", Kind.ATTENTION: "*", Kind.LINEAR: "G", Kind.MLP: "-", Kind.EXPERTS: "E"}
MIXERS = (Kind.ATTENTION, Kind.LINEAR, Kind.MAMBA)  # of tokens with each other
FEED_FORWARD = (Kind.MLP, Kind.EXPERTS)

Layers = tuple[tuple[Kind, ...], ...]  # of every layer; those that predict one more token are last


def attention_first(config: dict, sparse: tuple[int, ...]) -> Layers:
    """An attention, and an MLP or, in `sparse` layers, experts; layers that predict are like the last of the decoder."""
    return layers_of(config, sparse, ())


def layers_of(config: dict, sparse: tuple[int, ...], linear: tuple[int, ...]) -> Layers:
    """The same with linear attention in some layers; layers that predict have no linear attention."""
    count, predicting = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    made = []
    for layer in range(count + predicting):
        mixer = Kind.LINEAR if layer in linear else Kind.ATTENTION
        feed_forward = Kind.EXPERTS if min(layer, count - 1) in sparse else Kind.MLP
        made.append((mixer, feed_forward, *((Kind.JOIN, Kind.LAST) if layer >= count else ())))
    return tuple(made)


def by_layer_types(config: dict, sparse: tuple[int, ...]) -> Layers:
    """Linear attention in the layers that `layer_types` names, or else in all but every `full_attention_interval`th, 4 by default.

    `ExportError` for a layer of another kind.
    """
    count, interval = config["num_hidden_layers"], config.get("full_attention_interval") or 4
    types = config.get("layer_types") or [
        "full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(count)
    ]
    report(
        [
            f"config.json: layer_types has {shown(kind)}: layers of this architecture are 'linear_attention' or 'full_attention'"
            for kind in dict.fromkeys(types)
            if kind not in ("linear_attention", "full_attention")
        ]
    )
    return layers_of(config, sparse, tuple(layer for layer, kind in enumerate(types) if kind == "linear_attention"))
