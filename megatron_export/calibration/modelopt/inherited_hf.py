"""What a live transformers model inherits from ModelOpt: as of a Megatron model, once its HF linears are joined to canonical ones.

Where ModelOpt searched linears that read one input (q, k and v; gate and up) one by one, each has a smoothing vector of its own and
its weight is multiplied by the inverse. Their mean takes the place of all, and the weights are smoothed anew, as ModelOpt's own
export does: W <- bfloat16(W * own / mean).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...common.errors import ExportError, report
from ...formats import PLAIN
from ...hf.tensors import Piece
from ...models import parameters_of, pooled, vector_home
from ...models.statistic_names import weight_key
from ...planning.request import Request
from ..lookup import Statistics
from .blocks import STATIC, Blocks, kept, stale
from .inherited import contradictions, settled
from .quantizers import Quantizers, blocks_in, inherited_in, kinds_of, merged_kinds, scalars_in, vectors_in

Vectors = dict[str, tuple[Tensor, Tensor]]  # HF weight -> what it is smoothed with, and what takes its place


def inherited_from_transformers(
    config: dict,
    tables: list[Quantizers],
    weight_of: Callable[[str, str], Piece | None],
    request: Request,
    given: Statistics | None,
) -> tuple[Request, Statistics | None]:
    """The request with what the quantizers of a transformers model say, and their statistics.

    tables     the quantizers of the first, second, ... layout part of each canonical module
    weight_of  (canonical linear, layout part) -> what this rank has of its weight, as it is in the model
    Of a model without quantizers, the request with its defaults, and the statistics that the user gave. `ExportError` if the two
    contradict each other, or if no format here does what its quantizers do.
    """
    kinds = _joined(config, tables)
    inherited = inherited_in(kinds)
    if inherited is None:
        return request.plain(), given
    report(contradictions(config, inherited, request, given))
    statistics: dict[str, Tensor] = {}
    for table in tables:
        for name, value in scalars_in(table).items():
            statistics[name] = torch.tensor(max(value, float(statistics.get(name, 0.0))))
    report(stale(_other_blocks(config, tables, weight_of, inherited.scales, statistics)))
    means = _means(tables)
    for linear, vector in means.items():
        statistics[inherited.vector_key(linear)] = vector.float().cpu()
    for linear in _apart(tables, means):
        statistics.pop(weight_key(linear), None)  # of weights that are smoothed anew
    return settled(config, inherited, request), statistics


def _other_blocks(
    config: dict,
    tables: list[Quantizers],
    weight_of: Callable[[str, str], Piece | None],
    scales: str,
    statistics: Statistics,
) -> list[str]:
    """The linears whose blocks have other amaxes than their quantizers. Parts that share one are one weight to it.

    `scales` are those of static NVFP4 that are written, made by the weight's amax in `statistics`.
    """
    parts = {name.removesuffix(".weight"): source.layout.parts for name, source in parameters_of(config).items()}
    shared: dict[int, tuple[str, Blocks, list[str]]] = {}
    for number, table in enumerate(tables):
        for linear, one in blocks_in(table).items():
            shared.setdefault(id(one.amax), (linear, one, []))[2].append(parts[linear][number])
    return [
        f"{linear} {' and '.join(some)}".rstrip()
        for linear, one, some in shared.values()
        if _differ(
            [weight_of(linear, part) for part in some],
            one,
            scales if one.scales == STATIC else one.scales,
            float(statistics.get(weight_key(linear), 0.0)),
        )
    ]


def _differ(pieces: list[Piece | None], blocks: Blocks, scales: str, largest: float) -> bool:
    """Whether blocks of what a rank has of weights, one under the other, have other amaxes than these; of whole blocks alone."""
    amax, size = blocks.amax, blocks.size
    if all(piece and piece.data.shape == piece.shape for piece in pieces):
        return not kept(torch.cat([piece.data for piece in pieces]), amax, blocks, scales, largest)
    found, above = False, 0
    for piece in filter(None, pieces):
        (rows, columns), (first, left) = piece.data.shape, piece.firsts
        first += above
        above += piece.shape[0]
        if rows and not (first % size[0] or rows % size[0] or left % size[1] or columns % size[1]):
            grid = amax.reshape(-1, -(-piece.shape[1] // size[1]))
            own = grid[first // size[0] : (first + rows) // size[0], left // size[1] : (left + columns) // size[1]]
            found |= not kept(piece.data, own, blocks, scales, largest)
    return found


def smoothed_anew(config: dict, tables: list[Quantizers]) -> Vectors:
    """HF weight -> its smoothing vector and the one that takes its place, where the two differ."""
    means, found = _means(tables), {}
    for name, source in parameters_of(config).items():
        linear = name.removesuffix(".weight")
        for hf, vectors in zip(source.names().values(), map(vectors_in, tables), strict=False):
            if linear in vectors and not torch.equal(vectors[linear], means[linear].float()):
                found[hf] = vectors[linear], means[linear]
    return found


def _joined(config: dict, tables: list[Quantizers]) -> dict[str, str]:
    """`kinds_of` the whole model; `ExportError` if the parts of a linear differ."""
    each = [kinds_of(table) for table in tables]
    for name, source in parameters_of(config).items():
        linear = name.removesuffix(".weight")
        own = dict(zip(source.names().values(), (kinds.get(pooled(linear), PLAIN) for kinds in each), strict=False))
        if len(set(own.values())) > 1:
            said = ", ".join(f"{hf.removesuffix('.weight')} to {kind}" for hf, kind in own.items())
            raise ExportError(
                f"ModelOpt quantized linears that engines fuse to several formats: {said}. Quantize them alike, or disable the "
                "quantizers of all of them before they are calibrated"
            )
    return merged_kinds(each)


def _means(tables: list[Quantizers]) -> dict[str, Tensor]:
    """Linear -> the mean of the vectors of all that read its input, in their own dtype."""
    groups: dict[str, list[Tensor]] = {}
    linears: dict[str, str] = {}
    for table in tables:
        for linear, vector in vectors_in(table).items():
            linears[linear] = vector_home(linear)
            groups.setdefault(linears[linear], []).append(vector.to(torch.bfloat16))
    means = {home: torch.stack(vectors).mean(dim=0) for home, vectors in groups.items()}
    return {linear: means[home] for linear, home in linears.items()}


def _apart(tables: list[Quantizers], means: dict[str, Tensor]) -> list[str]:
    """The linears of which a part has another vector than the mean."""
    found = [
        linear
        for table in tables
        for linear, v in vectors_in(table).items()
        if not torch.equal(v, means[linear].float())
    ]
    return list(dict.fromkeys(found))
