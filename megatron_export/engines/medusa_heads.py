"""Medusa's heads as engines find them: blocks that add to the hidden state, and an output layer behind the last."""

import re
from dataclasses import dataclass
from functools import cached_property

from .checkpoint_view import CheckpointView, Header
from .checks import AGAIN, check_files
from .verdict import Findings

_BLOCK = re.compile(r"(?:medusa_heads\.)?(\d+)\.(\d+)\.linear\.(\w+)|blocks\.(\d+)\.layers\.(\d+)\.(\w+)")
_HEAD = re.compile(r"(?:medusa_heads\.)?(\d+)\.\d+\.(\w+)|lm_heads\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class Heads:
    """blocks   name of a tensor -> its head, its block in it and its suffix
    outputs  name of a tensor of an output layer -> its head and its suffix
    others   the other names
    """

    tensors: dict[str, Header]
    blocks: dict[str, tuple[int, int, str]]
    outputs: dict[str, tuple[int, str]]
    others: tuple[str, ...]

    @cached_property
    def count(self) -> int:
        return len({head for head, *_ in (*self.blocks.values(), *self.outputs.values())})

    @cached_property
    def layers(self) -> int:
        """Blocks of a head."""
        return len({block for _, block, _ in self.blocks.values()})


def heads_of(checkpoint: CheckpointView) -> Heads:
    """The heads in a folder, whichever of the names they have that engines know."""
    tensors, blocks, outputs = checkpoint.whole.tensors, {}, {}
    for name in tensors:
        if found := _BLOCK.fullmatch(name):
            head, block, suffix = (one for one in found.groups() if one is not None)
            blocks[name] = int(head), int(block), suffix
        elif found := _HEAD.fullmatch(name):
            head, suffix = (one for one in found.groups() if one is not None)
            outputs[name] = int(head), suffix
    return Heads(tensors, blocks, outputs, tuple(name for name in tensors if name not in blocks | outputs))


def check_heads(
    heads: Heads, checkpoint: CheckpointView, base: CheckpointView | None, bias: bool, findings: Findings
) -> None:
    """Files, and the heads against config.json and the base; `bias`: the engine builds blocks with one."""
    check_files(checkpoint, findings)
    if base is None:
        findings.add("base", "give its base with --with: vocabulary and hidden size were not compared with it")
    hidden, vocabulary = checkpoint.number("hidden_size"), (base or checkpoint).number("vocab_size")
    there = {(head, block, suffix) for head, block, suffix in heads.blocks.values()}
    there |= {(head, heads.layers, suffix) for head, suffix in heads.outputs.values()}
    for head in range(heads.count):
        wanted = [(head, block, suffix) for block in range(heads.layers) for suffix in ("weight", *("bias",) * bias)]
        for one in (*wanted, (head, heads.layers, "weight")):
            if one not in there:
                findings.add("missing", "it is not there", "medusa_heads.{}.{}.{}".format(*one), way=AGAIN)
    for name, header in heads.tensors.items():
        if name.endswith("weight") and header.dtype in ("F8_E4M3", "U8", "I8"):
            why = f"it is {header.dtype}: its codes would be taken for numbers, and its scales skipped"
            findings.add("codes", why, name, way="write it in bfloat16")
        elif name in heads.outputs and name.endswith("weight") and header.shape != (vocabulary, hidden):
            rule = "vocabulary" if base and header.shape[-1:] == (hidden,) else "shape"
            findings.add(rule, f"it is {list(header.shape)}, and {[vocabulary, hidden]} is meant", name,
                         way="give the base that it was trained with")  # fmt: skip
        elif name in heads.blocks and name.endswith("weight") and header.shape != (hidden, hidden):
            findings.add("shape", f"it is {list(header.shape)}, and {[hidden, hidden]} is meant", name, way=AGAIN)
    if base is not None and hidden != base.number("hidden_size"):
        why = f"hidden_size is {hidden} in the draft's config.json, and {base.number('hidden_size')} in the base's"
        findings.add("hidden", why, way="give the base that it was trained with")
