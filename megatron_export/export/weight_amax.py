"""One pass over this rank's weights before any is encoded: their maxima, agreed over ranks, and a checksum of the whole model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..calibration.lookup import measured
from ..common.errors import report
from ..common.strips import survey_strips
from ..common.threads import each
from ..distributed import collectives
from ..distributed.collectives import together
from ..distributed.signals import heeded
from ..distributed.topology import Topology
from ..formats.cpu import Largest
from ..models.statistic_names import weight_key
from ..planning.kept_codes import blocks_of, by_row
from ..planning.parameter import Item
from ..planning.plan import Plan
from ..writing.fingerprint import Checksum, added, checksum, forgetting, of_settings


def survey(
    here: Topology, plan: Plan, shards: Mapping[str, Tensor], calibration: dict[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """The amax of each weight that this rank quantizes, smoothed, agreed over the ranks that share it, float32 []; and, on
    rank 0, a checksum of the model ("" on the others). Collective. `ExportError` for NaN and Inf in any weight.

    Weights are rounded to bfloat16 before they are quantized, so their maxima are too.
    """
    mine = [item for item in plan.items if here.rank in item.ranks]
    with together(here, "read the weights"), forgetting():
        largest, summed, scales_of = [], [], {}
        for item in heeded(mine):
            shard = shards[item.source.canonical]  # once: it may be read from disk
            found, number = _read(here, item, shard, calibration)
            largest.append(found)
            summed.append(number)
            if item.kept:
                scales = shards.scales(item.source.canonical, blocks_of(item.form))
                scales_of[f"scales of {item.source.canonical}"] = _checksum_of_scales(here, item, scales)
        values = torch.stack(largest) if largest else torch.zeros(0, device=here.device)
        bad = [item for item, finite in zip(mine, values.isfinite().tolist(), strict=True) if not finite]
        report([f"NaN or Inf in {', '.join(item.source.names().values())}" for item in bad])
        numbers = torch.stack(summed).tolist() if summed else []
        sums = scales_of | {item.source.canonical: number for item, number in zip(mine, numbers, strict=True)}
    return _agreed(here, plan, mine, values, calibration), _digest(collectives.at_first(here, sums))


def _agreed(
    here: Topology, plan: Plan, mine: list[Item], values: Tensor, calibration: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The maxima of whole weights, and of those that engines fuse, from those of this rank's shards; clipped."""
    number = {item.source.canonical: n for n, item in enumerate(plan.items)}
    everyones = torch.zeros(len(plan.items), device=here.device)
    everyones[[number[item.source.canonical] for item in mine]] = values
    agreed = collectives.maximum(everyones, None)  # over all ranks: shards, and fused linears, may be anywhere
    amaxes = {}
    for item, amax in zip(plan.items, agreed, strict=True):
        if not item.form:
            continue
        name, smoothed = item.source.canonical, item.smoothed
        given = calibration.get(weight_key(name.removesuffix(".weight")))
        if given is not None and not smoothed.rows:  # which change the weight that it was measured on
            amax = given.to(here.device)
        amaxes[name] = amax * calibration[smoothed.ratio].to(here.device) if smoothed.ratio else amax
    for fused in plan.fused:
        amaxes |= dict.fromkeys(fused, torch.stack([amaxes[name] for name in fused]).amax())
    return amaxes


def _read(here: Topology, item: Item, shard: Tensor, calibration: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The amax of what is quantized of a shard, float32 [], and the checksum of the shard, int64 []; a GPU is not waited for."""
    source, index = item.source, item.ranks.index(here.rank)
    cuts, columns = source.share(source.shape[0], tuple(shard.shape), index, len(item.ranks))
    rows = tuple(range(cut.start, cut.stop) for cut in cuts)
    real = source.layout.real(shard, index, len(item.ranks))
    summed = Checksum(real.to(source.torch_dtype), rows, columns[0].start if columns else 0)
    if not item.smoothed.vectors:
        return _amax(real, summed)
    parts = item.split(shard, index, measured(item, calibration, here.device)).values()
    return torch.stack([_amax(part.data)[0] for part in parts]).amax(), _amax(real, summed)[1]


def _amax(values: Tensor, summed: Checksum | None = None) -> tuple[Tensor, Tensor]:
    """The largest magnitude as bfloat16 holds it, float32 []; NaN or Inf stay visible. And the checksum of all rows, which are in
    the cache then, int64 [].
    """
    nothing = torch.zeros((), dtype=torch.int64, device=values.device)
    if values.numel() == 0:
        return nothing.float(), nothing
    values = values if values.dim() else values.reshape(1)
    strips, largest = list(survey_strips(values)), Largest(values)
    if summed is None:
        return largest.total(each(largest.of_strip, strips)), nothing
    amaxes, sums = zip(*each(lambda rows: (largest.of_strip(rows), summed.of_strip(rows)), strips), strict=True)
    return largest.total(amaxes), summed.total(sums)


def _checksum_of_scales(here: Topology, item: Item, scales: Tensor) -> int:
    source, index = item.source, item.ranks.index(here.rank)
    cuts, columns = source.share(source.shape[0], item.shard_shape, index, len(item.ranks))
    numbers = source.layout.real(by_row(item, scales), index, len(item.ranks))
    halves = numbers.view(torch.int16) if numbers.dtype == torch.float32 else numbers.to(torch.int16)
    first = columns[0].start // item.form.tile[1] * (halves.shape[1] // numbers.shape[1]) if columns else 0
    return checksum(halves, tuple(range(cut.start, cut.stop) for cut in cuts), first)


def _digest(everyones: list[dict[str, int]] | None) -> str:
    """One number for the whole model from the checksums of all ranks' shards; "" on ranks that are not given them."""
    found: dict[str, list[int]] = {}
    for theirs in everyones or ():
        for name, number in theirs.items():
            found.setdefault(name, []).append(number)
    return of_settings({name: added(numbers) for name, numbers in found.items()}) if found else ""
