"""From calibration statistics to the numbers that each item of a plan is quantized with; refuses what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..common.errors import ExportError, report
from ..formats import groups_of
from ..formats.int4 import CLIP_RATIOS
from ..models.statistic_names import channels, input_key, is_clipping, is_vector, kv_keys
from ..planning.parameter import Item
from ..planning.plan import Plan
from ..planning.smoothed import Measured

if TYPE_CHECKING:
    from torch import Tensor

Statistics = dict[str, "Tensor"]


def is_needed(plan: Plan) -> bool:
    """Whether the plan needs any statistics."""
    return any(needed_by(item) for item in plan.items)


def check_calibration(plan: Plan, calibration: Statistics | None) -> None:
    """Raise unless the statistics hold every number that the plan needs, of the right size, finite and in its range."""
    needed = {name for item in plan.items for name in needed_by(item)}
    if needed and calibration is None:
        raise ExportError(f"format {plan.format} needs calibration: pass what calibrate() returned, or load a file")
    calibration = calibration or {}
    missing = sorted(needed - calibration.keys())
    form = plan.awq
    if form and missing:
        how, group = form.smoothing, form.tile[1]
        again = f"Calibrate with --format {form.name}"
        again += f" --group-size {group}" if group in groups_of(form.name)[1:] else ""
        if not any(is_vector(name, how.search) for name in calibration):
            raise ExportError(
                f"the calibration holds no smoothing {how.search}, which {form.name} needs: it was measured for "
                f"another format. {again}"
            )
        if how.clip and not any(is_clipping(name) for name in needed & calibration.keys()):
            raise ExportError(f"the calibration holds no clipping for {how.search}. {again} --awq-clip")
    report([f"the calibration has no {name}: measured on another model, or incomplete" for name in missing])
    report([problem for item in plan.items for problem in _problems(item, calibration)])


def numbers_on(device: torch.device, calibration: Statistics) -> Statistics:
    """The same statistics, those that are one float32 number on `device`: all are sent at once, as each alone is waited for."""
    numbers = [name for name, value in calibration.items() if not value.dim() and value.dtype == torch.float32]
    if device.type == "cpu" or not numbers:
        return calibration
    sent = torch.stack([calibration[name] for name in numbers]).to(device)
    return calibration | dict(zip(numbers, sent.unbind(), strict=True))


def measured(item: Item, calibration: Statistics, device: torch.device) -> Measured:
    """What the statistics say of one item, on `device`."""
    needed = {name: calibration[name] for name in needed_by(item)}
    smoothed = item.smoothed
    vectors = {name: needed[name] for name in smoothed.vectors}
    amax = torch.full(
        (), torch.nan, device=device
    )  # a format that is given none and uses it writes NaN, which is refused
    if item.form and item.form.measures:
        name = input_key(item.source.canonical.removesuffix(".weight"))
        # ModelOpt rounds the amax of smoothed inputs to the model's bfloat16
        amax = (
            needed[name]
            if smoothed.columns is None or item.smoothing_done
            else (needed[channels(name)] * vectors[smoothed.columns]).amax().to(torch.bfloat16).float()
        )
    return Measured(
        input=amax.to(device),
        kv=tuple(value.to(device) for value in _kv_amax(item, needed)),
        vectors={name: vector.to(device) for name, vector in vectors.items()},
        ratio=needed[smoothed.ratio].to(device) if smoothed.ratio else None,
        codes={part: needed[name].to(device) for part, name in smoothed.codes},
    )


def _problems(item: Item, calibration: Statistics) -> list[str]:
    """What is wrong with the numbers that an item needs."""
    smoothed = item.smoothed
    codes = {name for _, name in smoothed.codes}
    ranges = {name: (9e-5, 1.1e4) for name in smoothed.vectors}  # beyond what clamped factors can give
    ranges |= {name: (0, len(CLIP_RATIOS) - 1) for name in codes}
    ranges |= {smoothed.ratio: (CLIP_RATIOS[0], CLIP_RATIOS[-1])} if smoothed.ratio else {}
    problems = []
    for name, shape in needed_by(item).items():
        found, dtype = calibration[name], torch.uint8 if name in codes else torch.float32
        if found.dtype != dtype or (shape is not None and found.shape != shape):
            problems.append(
                f"the calibration's {name} is {found.dtype} {tuple(found.shape)}, not {dtype} {shape}: it is for another model"
            )
            continue
        low, high = float(found.min()), float(found.max())
        least, most = ranges.get(name, (0, torch.finfo(torch.float32).max))
        if not (least <= low and high <= most):
            problems.append(f"the calibration's {name} is {low}" + ("" if low == high else f" to {high}"))
    return problems


def needed_by(item: Item) -> dict[str, tuple[int, ...] | None]:
    """The statistics of an item and their shapes; None for a vector of another item, which that one looks at."""
    name, smoothed = item.source.canonical, item.smoothed
    needed: dict[str, tuple[int, ...] | None] = dict.fromkeys(sorted(smoothed.vectors))
    if smoothed.columns:
        needed[smoothed.columns] = item.source.shape[1:]
    if item.form and item.form.measures:
        key = input_key(name.removesuffix(".weight"))
        by_channel = smoothed.columns and not item.smoothing_done
        needed |= {channels(key): item.source.shape[1:]} if by_channel else {key: ()}
    if smoothed.ratio:
        needed[smoothed.ratio] = ()
    for (_, codes), part in zip(smoothed.codes, item.parts if smoothed.codes else (), strict=True):
        needed[codes] = (part.shape[0], part.shape[1] // item.form.tile[1])
    if item.kv and item.kv.calibrated:
        k_amax, v_amax = kv_keys(name.rsplit(".", 2)[0])
        by_channel = "v" in dict(smoothed.rows)
        needed |= {k_amax: ()} | ({channels(v_amax): item.parts[2].shape[:1]} if by_channel else {v_amax: ()})
    return needed


def _kv_amax(item: Item, needed: Statistics) -> tuple[Tensor, ...]:
    """The amax of the keys and of the values, these after the smoothing of o_proj was folded into v_proj."""
    if item.kv is None:
        return ()
    if not item.kv.calibrated:
        return torch.tensor(torch.nan), torch.tensor(torch.nan)  # as of inputs
    k_amax, v_amax = kv_keys(item.source.canonical.rsplit(".", 2)[0])
    if (vector := dict(item.smoothed.rows).get("v")) is None:
        return needed[k_amax], needed[v_amax]
    factors = item.source.layout.first_queries(needed[vector])
    return needed[k_amax], (needed[channels(v_amax)] * factors).amax()
