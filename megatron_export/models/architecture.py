"""What an architecture says of itself, in `ARCHITECTURE` of its file: its rules, and where it differs from a Llama."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .rules import Table
from .shape import ModelShape

Settings = Mapping[str, object]  # fields of Megatron's TransformerConfig


def _nothing_more(config: dict, shape: ModelShape) -> Settings:
    return {}


def _alike(config: dict, length: int) -> str:
    return ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Architecture:
    """One architecture. docs/add-a-model.md shows how to find out each field; what is not said is as in a Llama.

    Which tensors it has:

    rules       canonical Megatron name -> rule: every parameter that a Megatron model of it may have, and no other
    where       config.json key -> a field of TransformerConfig that is what the key is, and the rules of the parameters that a
                model has only where the key is true
    copied      what the names of HF tensors begin with that Megatron's model does not have, and that are copied from the original
    keys        key of config.json as hf_config.py reads it -> how this architecture spells it, where that is another word
    shared      how many shared experts a layer with experts has, where config.json has no key that says so

    What it computes:

    settings    fields of TransformerConfig beside those that transformer_config.py reads from config.json
    computed    (config.json's dict of the decoder, its sizes) -> more such fields, where they depend on config.json;
                `ExportError` for values that mean nothing
    only        config.json key -> the values that rules and settings are right for, the usual one first; None for a key that is
                not there. A model with another value is refused
    unlike      (config.json's dict of the decoder, tokens of a sample) -> why Megatron-Core computes such a sample otherwise than
                HF, so that activations cannot be calibrated on it, as a sentence; "" where it computes the same

    How it is written, for the engines and for transformers:

    formats     the formats that it is written in, by name; () for every format
    unsmoothed  of one with `formats`, why those that fold AWQ's vectors into linears are not among them
    stacked     whether quantized experts, too, are written stacked as HF has them, in a format that can be; others are written one
                by one
    turned      whether engines put rows of q and k in another order, so that scales of rows would be those of others
    routing     what engines read in config.json that transformers leaves out when it saves a model: key -> value
    on_disk     names in transformers' modules -> on disk, where the two differ: patterns and what they become, one after another
    """

    rules: Table
    where: Mapping[str, tuple[str, Table]] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    shared: int = 0

    settings: Settings = field(default_factory=dict)
    computed: Callable[[dict, ModelShape], Settings] = _nothing_more
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    unlike: Callable[[dict, int], str] = _alike

    formats: tuple[str, ...] = ()
    unsmoothed: str = ""
    stacked: bool = False
    turned: bool = False
    routing: Mapping[str, object] = field(default_factory=dict)
    on_disk: tuple[tuple[str, str], ...] = ()
