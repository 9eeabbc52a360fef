"""What a draft is, and what every engine demands of one of EAGLE-3: tensors of its layers, and a base of its sizes.

Engines rename tensors of drafts as they load them; each says how, and then all rules speak of the same names: layers.0, fc, norm,
lm_head, d2t. Rules have the same names in each engine's table.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from .checkpoint_view import CheckpointView, Group
from .checks import AGAIN, check_codes, check_files
from .exclude_lists import Names, Partly
from .quant_configs import Matcher, Reading, left_out
from .verdict import Findings

EAGLE3, MEDUSA, COMBINED, ANOTHER = "eagle3", "medusa", "combined", "another"
_HEADS = re.compile(r"(medusa_heads\.)?\d+\.\d+\.(linear\.)?(weight|bias)|blocks\.\d+\.layers\.\d+\.weight")
_NOT_LOADED = ("t2d", "d2t", "embed_tokens.weight", "lm_head.weight")
_INTEGERS = ("I64", "I32")


def kind_of(checkpoint: CheckpointView) -> str:
    """EAGLE3, MEDUSA (heads in a folder of their own), COMBINED (with their base), ANOTHER that has no rules; '' for no draft."""
    config, outside = checkpoint.config, checkpoint.outside
    if (
        config.get("model_type") == "medusa"
        or isinstance(config.get("medusa"), dict)
        or any(map(_HEADS.fullmatch, outside))
    ):
        return COMBINED if any(name.startswith("model.layers.") for name in checkpoint.whole.tensors) else MEDUSA
    said = "eagle3" in checkpoint.architecture.lower() or isinstance(config.get("eagle_config"), dict)
    two_norms = any(
        name.startswith(("midlayer.", "layers.")) and name.endswith(".hidden_norm.weight") for name in outside
    )
    if said or "draft_vocab_size" in config or two_norms:
        return EAGLE3
    return ANOTHER if "fc.weight" in outside else ""


@dataclass(frozen=True)
class Draft:
    """A draft of EAGLE-3 as an engine reads it; `base` is the checkpoint that it drafts for, None if it is not known.

    norm   which norm an engine reads before the attention of layers behind the first
    count  for how many layers of the base the engine builds fc
    """

    checkpoint: CheckpointView
    base: CheckpointView | None
    norm: str
    count: int

    @property
    def hidden(self) -> int:
        return self.checkpoint.number("hidden_size")

    @property
    def input(self) -> int:
        """The hidden size of the base, as the draft's config says it."""
        return self.checkpoint.number("target_hidden_size") or self.hidden

    @property
    def vocabulary(self) -> int:
        """How many tokens it can draft."""
        return self.checkpoint.number("draft_vocab_size") or self.checkpoint.number("vocab_size")

    @property
    def smaller(self) -> bool:
        """Whether it drafts fewer tokens than there are, so that d2t says which."""
        return self.vocabulary != (self.base or self.checkpoint).number("vocab_size")

    @cached_property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, of those that the engine needs for its layers, fc and the last norm."""
        number, hidden = self.checkpoint.number, self.hidden
        heads = number("num_attention_heads")
        head = number("head_dim") or (hidden // heads if heads else 0)
        queries, keys, inner = (
            heads * head,
            (number("num_key_value_heads") or heads) * head,
            number("intermediate_size"),
        )
        found = {"norm.weight": (hidden,), "fc.weight": (hidden, self.input * self.count)}
        for layer in range(min(self.checkpoint.layers, 1000)):
            inputs = hidden if layer else 2 * hidden
            linears = {
                "self_attn.q_proj": (queries, inputs),
                "self_attn.k_proj": (keys, inputs),
                "self_attn.v_proj": (keys, inputs),
                "self_attn.o_proj": (hidden, queries),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }
            norms = ("post_attention_layernorm", *((self.norm,) if layer else ("input_layernorm", "hidden_norm")))
            for name, shape in (linears | dict.fromkeys(norms, (hidden,))).items():
                found[f"layers.{layer}.{name}.weight"] = shape
        return found


def draft_of(
    checkpoint: CheckpointView, base: CheckpointView | None, spelled: Callable[[str], str], norm: str, count: int
) -> Draft:
    """A draft whose tensors have the names that an engine gives them."""
    files = {file: {spelled(name): one for name, one in held.items()} for file, held in checkpoint.files.items()}
    draft = Draft(replace(checkpoint, files=files), base, norm, count)
    return replace(draft, checkpoint=replace(draft.checkpoint, expected=draft.sizes))


def ids_in(section: object) -> tuple[int, ...]:
    """The layers of the base whose hidden states the draft takes, as a config or its eagle_config says; () if it does not."""
    found = section.get("eagle_aux_hidden_state_layer_ids") if isinstance(section, dict) else None
    whole = isinstance(found, list) and all(isinstance(one, int) for one in found)
    return tuple(found) if whole else ()


def count_in(checkpoint: CheckpointView) -> int:
    """For how many layers of the base vLLM and SGLang build fc."""
    return checkpoint.number("num_aux_hidden_states") or len(ids_in(checkpoint.config.get("eagle_config"))) or 3


def check_class(checkpoint: CheckpointView, known: bool, unread: bool, findings: Findings) -> bool:
    """The class that config.json names; False if tensors cannot be judged."""
    shown = checkpoint.architecture or "none"
    if unread:
        findings.add("architecture", f"no rules about the architecture {shown}: its tensors were not checked")
    elif not known:
        way = 'set "architectures": ["LlamaForCausalLMEagle3"] in config.json, and draft_vocab_size'
        findings.add("class", f"it has no class {shown} for a draft", way=way)
    return known and not unread


def check_draft(draft: Draft, findings: Findings) -> None:
    """Files, and the tensors of the layers, fc, d2t and the base's sizes."""
    check_files(draft.checkpoint, findings)
    tensors = draft.checkpoint.whole.tensors
    wide = tensors.get("fc.weight")
    inputs = wide.shape[-1] * (2 if wide.dtype == "U8" else 1) if wide and wide.shape else 0
    if draft.input and inputs % draft.input == 0 and inputs // draft.input not in (0, draft.count):
        why = f"it takes {inputs // draft.input} layers of the base, and config.json means {draft.count}"
        findings.add("aux", why, "fc.weight", way="list their numbers in eagle_config of config.json")
    for name, shape in draft.sizes.items():
        header = tensors.get(name)
        if header is None:
            rule = "norms" if name.endswith(f"{draft.norm}.weight") and not name.startswith("layers.0.") else "missing"
            findings.add(rule, "it is not there", name, way=AGAIN)
        elif header.shape != shape and header.dtype not in ("F8_E4M3", "U8", "I8") and name != "fc.weight":
            why = f"it is {list(header.shape)}, and config.json means {list(shape)}"
            findings.add("shape", why, name, way="give the config.json that belongs to these weights")
    for name in tensors:
        module = f"{name.rpartition('.')[0]}.weight"
        loaded = name in _NOT_LOADED or module in draft.sizes or name.startswith("lm_head.")
        if not loaded and not _is_norm(name, draft):
            findings.add("unknown", "no tensor of a draft of this architecture", name)
    _check_vocabulary(draft, findings)


def _is_norm(name: str, draft: Draft) -> bool:
    """Whether it is the norm of a layer behind the first that another engine reads."""
    return (
        name.endswith(("input_layernorm.weight", "hidden_norm.weight"))
        and name.replace("hidden_norm" if "hidden_norm" in name else "input_layernorm", draft.norm) in draft.sizes
    )


def _check_vocabulary(draft: Draft, findings: Findings) -> None:
    tensors, base = draft.checkpoint.whole.tensors, draft.base
    for name, shape in {"lm_head.weight": (draft.vocabulary, draft.hidden), "d2t": (draft.vocabulary,)}.items():
        header = tensors.get(name)
        if header and header.shape != shape and header.dtype not in ("F8_E4M3", "U8"):
            why = f"it is {list(header.shape)}, and config.json means {list(shape)}"
            findings.add("shape", why, name, way="give the config.json that belongs to these weights")
    if draft.smaller and "d2t" not in tensors:
        of = (base or draft.checkpoint).number("vocab_size")
        why = f"it is not there, and the draft knows {draft.vocabulary} of {of} tokens: nothing says which"
        findings.add("d2t", why, "d2t", way=AGAIN)
    if draft.smaller and "lm_head.weight" not in tensors:
        findings.add("head", "it is not there, and the base's has other rows", "lm_head", way=AGAIN)
    if "d2t" in tensors and tensors["d2t"].dtype not in _INTEGERS:
        findings.add("dtype", f"it is {tensors['d2t'].dtype}, and numbers of tokens are I64", "d2t")
    if draft.input != draft.hidden and "embed_tokens.weight" not in tensors:
        findings.add("embedding", "a draft that is not as wide as its base needs an embedding of its own", way=AGAIN)


def check_base(draft: Draft, bases: tuple[str, ...], findings: Findings) -> None:
    """The draft's config against its base's."""
    base = draft.base
    if base is None:
        findings.add("base", "give its base with --with: vocabulary, hidden size and layers were not compared with it")
        return
    if base.architecture not in bases:
        findings.add("target", f"it takes no hidden states out of {base.architecture or 'such a base'}")
    for rule, key, mine in (
        ("vocabulary", "vocab_size", draft.checkpoint.number("vocab_size")),
        ("hidden", "hidden_size", draft.input),
    ):
        if mine != base.number(key):
            why = f"{key} is {mine} in the draft's config.json, and {base.number(key)} in the base's"
            findings.add(rule, why, way="give the base that it was trained with")
    if _rope(draft.checkpoint.text) != _rope(base.text):
        why = f"it rotates with {_shown(draft.checkpoint.text)}, and its base with {_shown(base.text)}"
        findings.add("positions", why, way="right only if it was trained so: ModelOpt writes yarn by default")


def _rope(text: dict) -> tuple:
    scaling = next((one for key in ("rope_scaling", "rope_parameters") if isinstance(one := text.get(key), dict)), {})
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    return text.get("rope_theta", scaling.get("rope_theta")), kind, scaling.get("factor") if kind != "default" else None


def _shown(text: dict) -> str:
    theta, kind, factor = _rope(text)
    return f"rope_theta {theta}, {kind}{f' by {factor}' if factor else ''}"


def check_layers(draft: Draft, ids: tuple[int, ...], first: int, last: int, findings: Findings) -> None:
    """Which layers of the base the engine takes: as many as fc has inputs for, each one that it can hand out."""
    if len(set(ids)) not in (0, draft.count):
        why = f"config.json lists layers {', '.join(map(str, ids))} of the base, and fc takes {draft.count}"
        findings.add("aux", why, "fc.weight", way="list each layer once, as many as fc takes")
    if draft.base is not None and (outside := [one for one in ids if not first <= one <= last]):
        why = (
            f"it hands out layers {first} to {last} of this base, and config.json lists {', '.join(map(str, outside))}"
        )
        findings.add("aux layers", why, way="give the base that it was trained with")


def check_linears(
    draft: Draft,
    reading: Reading,
    parent_of: Callable[[Group], str],
    matcher: Matcher,
    optional: dict[str, frozenset[str]],
    tp: int,
    findings: Findings,
    never: str = "",
) -> None:
    """How linears are stored against what the config makes of them, but for one that the engine never quantizes.

    `parent_of` is the engine's name of the module around a group.
    """
    linears = draft.sizes.keys() - {f"{never}.weight"} | {"lm_head.weight"}
    groups = [
        group for group in draft.checkpoint.whole.groups if all(f"{name}.weight" in linears for name in group.members)
    ]
    view = replace(draft.checkpoint.whole, groups=tuple(groups))
    if reading.algorithm == "":
        findings.add(
            "mixed", "quantized_layers names no module of a draft as the engine does", way="one format for all of it"
        )
        return

    def listed(group: Group, names: Names) -> bool:
        called = Group(group.kind, parent_of(group), group.parts)
        return left_out(replace(reading, names=names), called, matcher, "")

    for name in reading.names.listed:
        if _leaves_out_all(tuple(group for group in view.groups if group.quantized), Names((name,)), listed):
            why = f"{name} in {reading.where} leaves out every linear, and they are stored in codes"
            findings.add("excludes all", why, way=f"take it out of both configs: {name} means the base")
            return

    def algorithm_of(group: Group) -> str | None:
        return None if reading.algorithm is None or listed(group, reading.names) else reading.algorithm

    check_codes(draft.checkpoint, view, reading, algorithm_of, optional, tp, findings)


def _leaves_out_all(groups: tuple[Group, ...], names: Names, listed: Callable[[Group, Names], bool]) -> bool:
    try:
        return len(groups) > 1 and all(listed(group, names) for group in groups)
    except Partly:
        return False
