"""What an architecture says of itself, in `ARCHITECTURE` of its file: its rules, and where it differs from a Llama."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .layer_kinds import Layers, attention_first
from .rules import Table
from .shape import ModelShape

Settings = Mapping[str, object]  # fields of Megatron's TransformerConfig


@dataclass(frozen=True, eq=False, kw_only=True)
class Architecture:
    """One architecture. docs/add-a-model.md shows how to find out each field; a field that is not given is as in a Llama.

    Which tensors it has:

    rules       canonical Megatron name -> rule: every parameter that a Megatron model of it may have, and no other
    where       config.json key -> the field of TransformerConfig with the same value, and the rules of parameters that a model
                has only if the key is true
    predicting  what HF names of layers that predict one more token begin with before the layer's number, from 0, if not as others
    copied      prefixes of HF tensors that Megatron's model does not have; they are copied from the original
    keys        key of config.json as hf_config.py reads it -> this architecture's own word for it
    implied     (config.json's dict of the decoder) -> keys that it leaves out, by their usual words: as HF's code fills them in
    mtp_unseen  whether calibration does not run layers that predict: they stay as they are, without scales of a cache
    shared      shared experts of a layer with experts, if no key of config.json says so
    layers      (config.json's dict of the decoder, the layers of it with experts) -> what each layer is made of
    sizes       how config.json says its sizes, if not as a language model's does
    more_sizes  (config.json's dict) -> fields of `ModelShape` that no other architecture has
    draft       whether it is a draft, which an engine serves beside the model that it was trained on

    What it computes:

    rotated     whether queries and keys are rotated by their positions
    settings    fields of TransformerConfig beside those that transformer_config.py reads from config.json
    computed    (config.json's dict of the decoder, its sizes) -> more such fields, where they depend on config.json;
                `ExportError` for values that mean nothing
    only        config.json key -> the values that rules and settings are right for, the usual one first; None for a missing key.
                A model with another value is refused
    sandwiched  (config.json's dict of the decoder) -> the rotary base of layers with windows, of a model whose outputs of attention
                and MLP are normed too, and whose embeddings are multiplied by the root of their size; None for any other
    unlike      (config.json's dict of the decoder, tokens of a sample) -> why Megatron-Core computes such a sample otherwise than
                HF, so that activations cannot be calibrated on it; "" if it computes the same

    How it is written, for the engines and for transformers:

    formats     names of the formats that it is written in; () for every format
    unsmoothed  why `formats` lacks those that fold AWQ's vectors into linears
    stacked     whether quantized experts are written stacked as HF has them, in a format that can be; else one by one
    published   the format that its publisher has its experts in, in a dialect of that format's own; "" for none
    spelled     HF module -> what lists of excluded modules call it, where engines do not have it under its HF name
    called      patterns of HF modules and what an engine calls them, which lists of excluded modules have as well, and of experts
                lists of formats too
    left        name of a format -> the ends of canonical modules that stay in bfloat16 in it, as not every engine loads them
    left_why    which these are, and why
    turned      whether engines reorder the rows of q and k, so that scales of rows would belong to other rows
    routing     config.json key -> value, which engines read and transformers leaves out when it saves a model
    respelled   (config.json's dict) -> more such keys where they depend on others, and keys that transformers writes in words that
                an engine does not know; those of a dict within are added to it
    on_disk     patterns and their replacements, in order, that turn names in transformers' modules into names on disk

    How its config.json is made of Megatron's settings, where a checkpoint comes without one (models/derivation.py):

    model_type  of config.json
    written     (fields of TransformerConfig) -> the keys that `layers`, `sizes` and `computed` read, by the usual words: the way
                back. What both ways make of a checkpoint's settings is compared, so a mistake in one of them is refused
    unsaid      keys of config.json that change what an engine computes, and that Megatron has no setting for
    """

    rules: Table
    where: Mapping[str, tuple[str, Table]] = field(default_factory=dict)
    predicting: str = ""
    copied: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    implied: Callable[[dict], dict] = lambda config: {}
    mtp_unseen: bool = False
    shared: int = 0
    layers: Callable[[dict, tuple[int, ...]], Layers] = attention_first
    draft: bool = False
    sizes: Callable[[dict], ModelShape] | None = None
    more_sizes: Callable[[dict], dict[str, int]] = lambda config: {}

    rotated: bool = True
    settings: Settings = field(default_factory=dict)
    computed: Callable[[dict, ModelShape], Settings] = lambda config, shape: {}
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    sandwiched: Callable[[dict], float] | None = None
    unlike: Callable[[dict, int], str] = lambda config, length: ""

    formats: tuple[str, ...] = ()
    unsmoothed: str = ""
    stacked: bool = False
    published: str = ""
    spelled: Mapping[str, str] = field(default_factory=dict)
    called: tuple[tuple[str, str], ...] = ()
    left: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_why: str = ""
    turned: bool = False
    routing: Mapping[str, object] = field(default_factory=dict)
    respelled: Callable[[dict], dict] = lambda config: {}
    on_disk: tuple[tuple[str, str], ...] = ()

    model_type: str = ""
    written: Callable[[Settings], dict] = lambda said: {}
    unsaid: tuple[str, ...] = ()

    def name_on_disk(self, name: str) -> str:
        """How files spell a name in transformers' modules."""
        for mine, theirs in self.on_disk:
            name = re.sub(mine, theirs, name)
        return name

    def names(self, module: str) -> tuple[str, ...]:
        """What lists in configs call an HF module: its name, and those that engines have for it."""
        mine = self.spelled.get(module, module)
        return mine, *(re.sub(pattern, other, module) for pattern, other in self.called if re.search(pattern, module))
