"""MedusaModel: Medusa's heads, which guess one token each, from the last hidden state of the model beside them, their base.

A head is a few blocks x + silu(linear(x)), and an output layer of its own. They are written for vLLM, which has them up to release
0.32: under the names of its modules, and in bfloat16, as it copies codes in as numbers. It skips biases unless `medusa_fc_bias` is
true, and takes every key of config.json with "num" and "heads", or with "num" and "layers", for the one that counts them.

TensorRT-LLM's engine flow reads them from their base's folder, as ModelOpt's export of transformers models has it: there they are
more parameters of the base, whose class is then called with Medusa before it. It knows such bases of Llama and Qwen 2, and reads
heads in FP8, of one block, as of several it takes the scales of the last.

In Megatron every rank of the last stage holds the blocks whole, and rows of the output layers. `num_heads` counts heads as other
models count layers, so a head has the canonical name of a layer.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from ..common.errors import ExportError
from .architecture import Architecture
from .rules import same, vocab
from .shape import ModelShape

NAME = "MedusaModel"
MOST_HEADS = 1000
MOST_BLOCKS = 4  # of a head; ModelOpt makes 1 unless told otherwise
HEADS = "medusa_heads"  # what ModelOpt calls the child of a model
BASES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
_BLOCK = re.compile(r"(\d+)\.(?:medusa_layers\.)?(\d+)\.linear\.(weight|bias)")
_OUTPUT = re.compile(r"(\d+)\.\d+\.weight")
_COUNTS = ("num_heads", "num_hidden_layers", "hidden_size", "vocab_size")
_MOST = 1 << 24
_TOLD = ("num_medusa_heads", "num_medusa_layers")


def _sizes(config: dict) -> ModelShape:
    wrong = [key for key in _COUNTS if type(config.get(key)) is not int or not 0 < config[key] <= _MOST]
    if wrong or config["num_heads"] > MOST_HEADS or config["num_hidden_layers"] > MOST_BLOCKS:
        most = f"num_heads up to {MOST_HEADS}, num_hidden_layers up to {MOST_BLOCKS}"
        raise ExportError(f"config.json of a {NAME} needs whole numbers above 0: {', '.join(_COUNTS)}; {most}")
    heads, blocks, hidden, tokens = (config[key] for key in _COUNTS)
    return ModelShape(NAME, heads, hidden, hidden, hidden, 1, hidden, tokens, False, base_vocab=tokens, blocks=blocks)


_BLOCKS = {
    f"decoder.layers.{{l}}.medusa_layers.{block}.linear.{leaf}": same(f"blocks.{{l}}.layers.{block}.{leaf}")
    for block in range(MOST_BLOCKS)
    for leaf in ("weight", "bias")
}
ARCHITECTURE = Architecture(
    draft=True,
    formats=("bf16",),
    sizes=_sizes,
    rules=_BLOCKS | {"decoder.layers.{l}.lm_head.weight": vocab("lm_heads.{l}.weight")},
    only={"medusa_fc_bias": (True,), "original_lm_head": (False, None)},
)


def not_medusa(names: Collection[str]) -> str:
    """Why heads with parameters of these names are not exported; "" if they are."""
    found = {match.groups() for name in names if (match := _BLOCK.fullmatch(name))}
    blocks = {int(block) for _, block, _ in found}
    if not found:
        return "they have no blocks, as ModelOpt's have them"
    if max(blocks) >= MOST_BLOCKS:
        return f"a head has {max(blocks) + 1} blocks, and {MOST_BLOCKS} are the most that are exported"
    whole = {(head, str(block), leaf) for head, _, _ in found for block in blocks for leaf in ("weight", "bias")}
    return (
        ""
        if found == whole
        else "some heads have other blocks than others, or no bias, and engines build them all alike"
    )


def counts_of(names: Collection[str]) -> dict:
    """How many heads and blocks there are, in words of config.json."""
    found = [match.groups() for name in names if (match := _BLOCK.fullmatch(name))]
    heads, blocks = {head for head, _, _ in found}, {block for _, block, _ in found}
    return {"num_heads": len(heads), "num_hidden_layers": len(blocks)}


def medusa_config(base: dict, said: dict) -> dict:
    """The config.json of heads beside a model with config.json `base`, the language model's part of it."""
    return {
        "architectures": [NAME],
        "model_type": "medusa",
        "hidden_size": base["hidden_size"],
        "vocab_size": base["vocab_size"],
        "truncated_vocab_size": base["vocab_size"],
        **said,
        "medusa_fc_bias": True,
        "original_lm_head": False,
        "torch_dtype": "bfloat16",
    }


def spelled(name: str) -> str:
    """What a folder of heads alone calls a tensor of a transformers model's heads."""
    if found := _BLOCK.fullmatch(name):
        return "blocks.{}.layers.{}.{}".format(*found.groups())
    found = _OUTPUT.fullmatch(name)
    return f"lm_heads.{found[1]}.weight" if found else name


def beside(name: str) -> str:
    """What a model of class `name` is called where heads are in its folder."""
    return f"Medusa{name}"


def with_heads(base: Architecture) -> Architecture:
    """A model with heads among its parameters."""
    rules = {
        f"{HEADS}.{{h}}.medusa_layers.{block}.linear.{leaf}": same(f"{HEADS}.{{h}}.{block}.linear.{leaf}")
        for block in range(MOST_BLOCKS)
        for leaf in ("weight", "bias")
    }
    rules[f"{HEADS}.{{h}}.lm_head.weight"] = vocab(f"{HEADS}.{{h}}.{{b}}.weight")
    return replace(base, rules=base.rules | rules, formats=("bf16", "fp8"), more_sizes=_counted)


def ignored(child: str, quantizers: dict[str, dict]) -> tuple[str, ...]:
    """What the user should know where heads in a folder of their own have quantizers, as ModelOpt says them."""
    if child != HEADS or all(one.get("_disabled") for one in quantizers.values()):
        return ()
    return (
        f"{HEADS} have quantizers of ModelOpt, and are written in bfloat16: vLLM reads no others. --medusa-layout combined writes "
        "them as they are quantized, for TensorRT-LLM",
    )


def _counted(config: dict) -> dict[str, int]:
    said = config.get("medusa")
    found = [said.get(key) for key in _TOLD] if isinstance(said, dict) else []
    limits = zip(found, (MOST_HEADS, MOST_BLOCKS), strict=False)
    if not found or any(type(count) is not int or not 0 < count <= most for count, most in limits):
        raise ExportError(
            f"config.json: medusa must say {_TOLD[0]} up to {MOST_HEADS} and {_TOLD[1]} up to {MOST_BLOCKS}"
        )
    return {"medusa": found[0], "blocks": found[1]}


def config_with_heads(base: dict, heads: dict) -> dict:
    """The config.json of a model with its heads, from that of each. `ExportError` for a base that no engine reads so."""
    name = base["architectures"][0]
    if name not in BASES:
        raise ExportError(
            f"--medusa-layout combined: TensorRT-LLM reads Medusa's heads beside {' and '.join(BASES)}, not beside {name}. Leave "
            "it out: heads in a folder of their own are for vLLM up to 0.32"
        )
    said = dict(zip(_TOLD, (heads["num_heads"], heads["num_hidden_layers"]), strict=True))
    return base | {"architectures": [beside(name)], "medusa": said}


def format_problems(blocks: int, formats: dict[str, str], plain: Iterable[str]) -> list[str]:
    """Why heads cannot be in a folder with their base, in these formats: those of quantized linears by canonical name. `plain` are
    the other linears.
    """
    left, other = sorted(n for n in plain if n.startswith(f"{HEADS}.")), "or write them with --medusa-layout draft"
    if not blocks or not formats:
        return []
    if left:
        module = left[0].removesuffix(".weight")
        return [
            f"{module} stays in bfloat16 ({len(left)} such), and TensorRT-LLM reads FP8 heads alone beside a base in FP8. Quantize "
            f"blocks and output layers of all heads (ModelOpt's presets leave out what is called *lm_head*), {other}"
        ]
    if blocks > 1:
        return [
            f"heads have {blocks} blocks, and TensorRT-LLM reads the scales of the last one alone. "
            f"Train heads of one block, {other}"
        ]
    return []
