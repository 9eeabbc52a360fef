"""What a calibration run takes of a rank's memory beside the weights: a bound, from sizes alone.

That is what one layer has alive at once for a micro-batch, and what an AWQ search holds of one linear beside it. Layers keep
nothing for each other, as there are no gradients. Counted in the modules that mcore/build.py builds, of Megatron-Core 0.16:
transformer/dot_product_attention.py, fusions/fused_softmax.py, transformer/mlp.py, transformer/moe/token_dispatcher.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ..common.strips import strip_elements
from ..formats import awq_gram
from ..models import HEAD, is_expert
from ..models.hf_config import text_of
from ..planning.parameter import Item
from ..planning.plan import Plan
from ..planning.rank_placement import Grid

CLIP_BYTES = 1 << 30  # of losses, when the clipping of AWQ is searched
# Bytes for each number of these kinds that a token, or a pair of tokens, has.
# In bfloat16 what comes in, what is normed and what goes out; in float32 the norm's input, square and product.
RESIDUAL = 18
HEADS = 10  # of queries, keys and values: as computed, as rotated, repeated for each head
SCORES = 14  # a buffer and its product in bfloat16, in float32 what the softmax is given and gives, in bfloat16 its rounded result
GATED = {"cpu": 12, "cuda": 8}  # gate and up, silu(gate), their product; a CPU has gate and up in float32 too
LOGITS = {
    "cpu": 6,
    "cuda": 4,
}  # as computed, and transposed, or on a CPU in float32; where the input of the output layer is measured
SEARCHED = {"input": 4, "output": 10}  # bfloat16 and smoothed; bfloat16, and in float32 twice
SQUARED = {"cpu": 12, "cuda": 4}  # inputs of a linear whose square is made: as gathered, on a CPU in float32 too
SQUARE = {"cpu": 12, "cuda": 6}  # what is kept of it, and a block in float32
PRODUCT = 4  # of a float32 output of one block of it
COPIES = {"cpu": 16, "cuda": 8}  # of a searched weight: four, which the CPU multiplies in float32
STRIP_COPIES = 24  # of a number in a strip of a weight that is rounded: six in float32


@dataclass(frozen=True)
class MicroBatch:
    """Samples of a micro-batch, and tokens of a sample."""

    samples: int
    length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length


def calibration_bytes(plan: Plan, grid: Grid, batch: MicroBatch, device: str) -> int:
    """The most bytes that a calibration run takes on any rank; `device` is where the model is, cuda or cpu."""
    shape, tp, tokens = grid.shape, grid.tp, batch.tokens
    sizes = (shape.nope_dim + shape.rope_dim, shape.v_dim) if shape.kv_lora else (shape.head_dim, shape.head_dim)
    heads = -(-shape.heads // tp)
    attention = SCORES * heads * batch.samples * batch.length**2 + HEADS * heads * tokens * sum((*sizes, sizes[0]))
    called = any(item.form and item.source.canonical == HEAD for item in plan.items)
    logits = called * LOGITS[device] * tokens * -(-shape.vocab // tp)
    mlp = GATED[device] * tokens * max(shape.ffn, shape.shared_ffn) // tp
    layer = max(attention, mlp, logits, _experts(plan, grid, batch, device))
    return RESIDUAL * tokens * shape.hidden + layer + max(_searched(plan, grid, batch, device), default=0)


def _exchanged(grid: Grid, batch: MicroBatch) -> int:
    """Tokens of all ranks that exchange those of a layer's experts."""
    return batch.tokens * max(grid.ep * grid.etp // grid.tp, 1)


def _experts(plan: Plan, grid: Grid, batch: MicroBatch, device: str) -> int:
    """Of a layer with experts: all exchanged tokens, copies of them for the experts that they go to, and one expert's work."""
    shape = grid.shape
    if not shape.experts:
        return 0
    tokens, own = _exchanged(grid, batch), shape.experts // grid.ep
    copies = tokens * min(text_of(plan.config)["num_experts_per_tok"], own)
    routing = tokens * (2 * shape.hidden + 12 * shape.experts)
    return routing + copies * 8 * shape.hidden + GATED[device] * tokens * shape.expert_ffn // grid.etp


def _searched(plan: Plan, grid: Grid, batch: MicroBatch, device: str) -> Iterator[int]:
    """What an AWQ search holds of each linear, where the format has one."""
    if plan.awq is None:
        return
    for item in {_size_of(item): item for item in plan.items if item.form is plan.awq}.values():
        tokens = _exchanged(grid, batch) if is_expert(item.source.canonical) else batch.tokens
        out, inputs = item.shard_shape
        squared = 0
        if not is_expert(item.source.canonical) and awq_gram.pays(tokens, *item.source.shape):
            squared, tokens = _squared(item, tokens, device), awq_gram.most_by_outputs(*item.source.shape)
        by_outputs = tokens * (
            SEARCHED["input"] * inputs + SEARCHED["output"] * out
        )  # as the last micro-batch may be smaller
        held = max(squared, by_outputs)
        strip = STRIP_COPIES * min(strip_elements(device), out * inputs)
        yield held + strip + COPIES[device] * prod(item.shard_shape) + CLIP_BYTES * plan.awq.smoothing.clip


def _squared(item: Item, tokens: int, device: str) -> int:
    """What the square of a linear's inputs takes, and inputs and weights that are gathered for it."""
    rows, columns = item.source.shape
    gathered = 4 * rows * columns if item.shard_shape[1] < columns else 0  # bfloat16 parts, and joined
    product = PRODUCT * rows * min(columns, awq_gram.WIDTH)
    return SQUARED[device] * tokens * columns + SQUARE[device] * columns**2 + product + gathered


def _size_of(item: Item) -> tuple:
    return item.shard_shape, is_expert(item.source.canonical)
