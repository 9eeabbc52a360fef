"""Which rank of a topology holds what, by Megatron's rules: from sizes alone, for plans without a model.

Ranks count through tensor, data and pipeline parallelism, the first fastest; for routed experts through expert-tensor, expert,
expert-data and pipeline parallelism. Layers are spread over pp * vpp stages; pipeline rank p has stages p, pp + p, 2 * pp + p and
so on. Only the first replica takes part in an export.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property

from ..common.errors import report
from ..models import Source, architecture_of, is_expert, settings_of, shape_of
from ..models.layouts import even_cut
from ..models.shape import ModelShape

PAD_VOCAB_TO = 128  # for each tensor-parallel rank, in models that the command builds
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Grid:
    """Sizes of a topology (`etp` is that of experts), and what each pipeline stage holds, in the letters of `stages_of`."""

    shape: ModelShape
    tp: int
    etp: int
    pp: int
    ep: int
    vpp: int
    world: int
    stages: tuple[str, ...]

    @property
    def per_stage(self) -> int:
        """Ranks that hold the same layers."""
        return self.world // self.pp

    def ranks(self, source: Source) -> range:
        """The ranks that hold the first replica of a parameter, in the order of its shards."""
        size, first = self.tp, self.stage_rank(source) * self.per_stage
        if is_expert(source.canonical):
            size, first = self.etp, first + self.expert_rank(source) * self.etp
        return range(first, first + size)

    def stage_rank(self, source: Source) -> int:
        """The pipeline rank that holds a parameter."""
        if source.layer is not None:
            return self._homes[source.layer]
        if source.canonical == _EMBEDDING:
            return 0
        if source.canonical.startswith("decoder.") and self.shape.mtp:
            return self._homes[self.shape.layers - 1]  # Megatron norms before the layers that predict one more token
        return self.pp - 1

    def expert_rank(self, source: Source) -> int:
        """The expert-parallel rank that holds a parameter of an expert."""
        return source.expert * self.ep // self.shape.experts

    def place(self, rank: int) -> tuple[int, int]:
        """The pipeline rank and the expert-parallel rank of a rank."""
        return rank // self.per_stage, rank % self.per_stage // self.etp % self.ep

    def copies(self, source: Source) -> int:
        """How many copies of a parameter of the first pipeline rank the last one has: of the embedding, one for a tied output
        layer and one for layers that predict one more token.
        """
        if source.canonical != _EMBEDDING or self.pp == 1:
            return 0
        return int(self.shape.tied) + bool(self.shape.mtp)

    @cached_property
    def _homes(self) -> tuple[int, ...]:
        """The pipeline rank of every layer."""
        letters = [(letter, stage % self.pp) for stage, held in enumerate(self.stages) for letter in held]
        return tuple(rank for letter, rank in letters if letter in "tm")


def grid_of(
    config: dict,
    tp: int = 1,
    etp: int | None = None,
    *,
    pp: int = 1,
    ep: int = 1,
    vpp: int = 1,
    world: int | None = None,
    pp_layout: str | None = None,
) -> Grid:
    """The topology of these sizes, the smallest if `world` is None, for config.json's model; `ExportError` if there is none."""
    shape, etp = shape_of(config), etp or tp
    problems = size_problems(config, tp=tp, etp=etp, ep=ep) + layout_problems(config, pp * vpp, pp_layout)
    smallest = math.lcm(tp * pp, ep * etp * pp)
    world = smallest if world is None else world
    if world % smallest:
        problems.append(
            f"world size {world} is no multiple of --tp {tp} x --pp {pp} = {tp * pp} and of --ep {ep} x --etp {etp} x --pp {pp} "
            f"= {ep * etp * pp}. Give {smallest}, or a multiple of it"
        )
    report(problems)
    return Grid(shape, tp, etp, pp, ep, vpp, world, stages_of(shape, pp * vpp, pp_layout))


def stages_of(shape: ModelShape, stages: int, pp_layout: str | None) -> tuple[str, ...]:
    """What each stage holds: E the embedding, t a layer, m one that predicts one more token, L the output layer. `pp_layout` says
    so as Megatron writes it; without it, layers are spread evenly.
    """
    if pp_layout is None:
        cuts = [even_cut(shape.layers, stage, stages) for stage in range(stages)]
        pp_layout = f"E{'|'.join('t' * (cut.stop - cut.start) for cut in cuts)}{'m' * shape.mtp}L"
    pp_layout = pp_layout.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        pp_layout = re.sub(repeated, lambda found: found[1] * int(found[2]), pp_layout)
    return tuple(pp_layout.split("|"))


def size_problems(config: dict, *, tp: int, etp: int, ep: int) -> list[str]:
    """Which heads, groups, sizes and experts a topology cannot divide; [] if it can divide all."""
    shape = shape_of(config)
    rules = architecture_of(config).rules.values()
    copied = not any(rule.cut_shape for rule in rules)  # several ranks may have a copy of one head of keys
    divided = (
        ("num_attention_heads", shape.heads, "--tp", tp),
        ("num_key_value_heads", tp if copied and tp % shape.groups == 0 else shape.groups, "--tp", tp),
        ("hidden_size", shape.hidden, "--tp", tp),
        ("intermediate_size", shape.ffn, "--tp", tp),
        ("the size of shared experts", shape.shared_ffn, "--tp", tp),
        ("the size of experts", shape.expert_ffn, "--etp", etp),
        ("the number of experts", shape.experts, "--ep", ep),
        ("linear_num_key_heads", shape.delta.key_heads if shape.delta else tp, "--tp", tp),
        ("linear_num_value_heads", shape.delta.value_heads if shape.delta else tp, "--tp", tp),
        ("mamba_num_heads", shape.mamba.heads if shape.mamba else tp, "--tp", tp),
        ("n_groups", shape.mamba.groups if shape.mamba else tp, "--tp", tp),
    )
    problems = [
        f"{name} {size} does not divide by {flag} {by}. Give a {flag} that divides it"
        for name, size, flag, by in divided
        if size % by
    ]
    if etp > 1 and shape.experts and settings_of(config)["add_bias_linear"]:
        problems.append(f"--etp {etp}: Megatron-Core cuts no experts with biases. Give --etp 1")
    if ep > 1 and not shape.experts:
        problems.append(f"--ep {ep}: this model has no experts. Leave it out")
    return problems


def layout_problems(config: dict, stages: int, pp_layout: str | None) -> list[str]:
    """Why layers cannot be put on so many stages; [] if they can."""
    shape = shape_of(config)
    if pp_layout is None:
        few = f"--pp x --vpp are {stages} stages for num_hidden_layers {shape.layers}"
        too_many = f"{few}. Give fewer, or say with --pp-layout which stages are empty"
        return [too_many] if stages > shape.layers else []
    found = stages_of(shape, stages, pp_layout)
    if unknown := sorted(set("".join(found)) - set("EtmL")):
        return [
            f"--pp-layout {pp_layout!r} has {unknown[0]!r}, no letter of Megatron's. Write it like 'Ettt|tttt|tttL'"
        ]
    meant = f"E{'t' * shape.layers}{'m' * shape.mtp}L"
    if len(found) != stages or "".join(found) != meant or (shape.mtp and "m" not in found[-1]):
        right = meant if shape.layers < 9 else f"Et*{shape.layers}{'m' * shape.mtp}L"
        return [
            f"--pp-layout {pp_layout!r} has {len(found)} stages; this model is {right}, m and L together, cut by | in --pp x --vpp "
            f"= {stages} stages"
        ]
    return []
