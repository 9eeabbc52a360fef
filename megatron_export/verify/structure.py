"""A finished checkpoint against the plan of such an export: names, dtypes, shapes, settings, exclude lists, shared scales."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import hf_folder
from ..checkpoint.hf_weights import SourceWeights, copied_tensors
from ..checkpoint.original import wide_in
from ..common.errors import ExportError
from ..common.file_names import CONFIG
from ..common.options import options_of, values_of
from ..formats import PLAIN, Options
from ..models import (
    architecture_of,
    copied_prefixes,
    head_of,
    is_beyond,
    is_linear_weight,
    parameters_of,
    rope_of,
    settings_of,
    shape_of,
    without_mtp,
)
from ..models.hf_config import text_of
from ..models.sources import expected_shapes
from ..planning.exclusions import fused_with, modules
from ..planning.plan import Plan, assumed, make_plan
from ..planning.recipe import Line
from ..planning.request import Request
from ..writing.quantized_modules import covers, is_scale
from .detect_format import Described
from .folder import Finished, json_of


def plan_of(found: Finished, said: Described, reference: Path) -> tuple[Plan, list[str]]:
    """The plan of an export of `reference` that gives such a checkpoint, and which linears differ from those fused with them."""
    config = hf_folder.read_config(reference)
    own = json_of(found.folder, CONFIG)
    if shape_of(config).mtp and not text_of(own).get("num_nextn_predict_layers"):
        config = without_mtp(config)
    sources = parameters_of(config)
    linears = {name: source for name, source in sources.items() if is_linear_weight(name)}
    stacked = any(source.stack and source.stack.name in said.quantized for source in linears.values())
    # Of linears that engines fuse: HF module -> its format, "" where it cannot be read.
    groups: dict[str, dict[str, str]] = {}
    for name, source in linears.items():
        for module in modules(source, stacked):
            form = said.forms.get(module)
            lost = bool({module, f"{module}.weight"} & found.lost)
            groups.setdefault(fused_with(name), {})[module] = "" if lost else form.name if form else PLAIN
    head = head_of(config).removesuffix(".weight")
    lines, problems = [Line(head, said.forms[head].name, "")] if head in said.forms else [], []
    usual = said.variants[0].form.name if said.variants else PLAIN
    for group in groups.values():
        votes = Counter(sorted(filter(None, group.values()), key=PLAIN.__eq__)).most_common(1)
        most = votes[0][0] if votes else usual
        lines += [Line(module, most, "", needed=False) for module in group]
        problems += [
            f"{module}.weight is {_as(format)}, unlike {len(group) - 1} that engines fuse with it"
            for module, format in group.items()
            if format not in ("", most) and said.algorithm
        ]
    attention = {module for name, source in linears.items() if ".self_attention." in name for module in modules(source)}
    latent = shape_of(config).kv_lora and any(line.glob in attention and line.format != PLAIN for line in lines)
    options = {name: value for one in said.variants for name, value in values_of(one.options).items()
               if value != options_of(Options)[name].default}  # fmt: skip
    plan = make_plan(
        config,
        assumed(config, 1),
        Request(
            " and ".join(dict.fromkeys(one.form.name for one in said.variants)) or PLAIN,
            kv_cache=said.kv if said.kv_scale or not shape_of(config).kv_lora else "none",
            kv_scale=said.kv_scale,
            options=Options(**options),
            quantize_mla=bool(latent and said.algorithm),
            recipe_lines=tuple(lines),
        ),
        copied=copied_tensors(reference, copied_prefixes(config)),
        wide=wide_in(reference, config),
    )
    return plan, problems


def _as(format: str) -> str:
    return "not quantized" if format == PLAIN else f"quantized to {format}"


def faults(found: Finished, said: Described, plan: Plan) -> list[str]:
    """Everything that headers and configs alone show to be wrong."""
    return [*_tensors(found, plan), *_settings(found.folder, plan), *_excludes(said, plan)]


def without_place(weights: SourceWeights, plan: Plan) -> list[str]:
    """Tensors of the reference that no checkpoint of this plan has, but for layers of MTP that were left out."""
    known = expected_shapes(item.source for item in plan.items)
    shared = (head_of(plan.config),) if shape_of(plan.config).tied else ()  # compared elsewhere
    rest = (n for n in sorted(weights.files) if n not in known and n not in shared)
    return [
        f"{name} of the reference is not part of this model: nothing in the checkpoint is made of it"
        for name in rest
        if not name.endswith("rotary_emb.inv_freq")
        and not name.startswith(copied_prefixes(plan.config))
        and (shape_of(plan.config).mtp or not is_beyond(name, plan.config))
    ]


def _tensors(found: Finished, plan: Plan) -> Iterator[str]:
    expected = {output.name: output for outputs in plan.files.values() for output in outputs}
    for name in sorted(expected.keys() - set(found) - found.lost):
        yield f"{name} is missing"
    allowed = ("rotary_emb.inv_freq", *((head_of(plan.config),) if shape_of(plan.config).tied else ()))
    for name in sorted(set(found) - expected.keys()):
        if not name.endswith(allowed):
            yield f"{name} is not part of this model in {plan.format}"
    for name in sorted(expected.keys() & set(found)):
        output, dtype, shape = expected[name], found.spelled(name), found.shape(name)
        if dtype != output.dtype:
            yield f"{name} is {dtype}, not {output.dtype}"
        elif shape != output.shape and not (torch.Size(shape).numel() == torch.Size(output.shape).numel() == 1):
            yield f"{name} is {list(shape)}, not {list(output.shape)}"


def _settings(folder: Path, plan: Plan) -> Iterator[str]:
    """Where config.json means another model than the reference's."""
    own = json_of(folder, CONFIG)
    if not own:
        yield "config.json is missing"
        return
    try:
        mine, theirs = _meaning(own), _meaning(plan.config)
    except ExportError as error:
        yield str(error)
        return
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            yield f"config.json means {key} = {mine.get(key)!r}, the reference's {theirs.get(key)!r}"


def _meaning(config: dict) -> dict:
    if architecture_of(config).sizes:  # Medusa's heads, which are no language model
        return asdict(shape_of(config))
    said = asdict(shape_of(config)) | settings_of(config) | {"rope": rope_of(config)}
    return said | {"head_dim": None, "kv_channels": None} if said["kv_lora"] else said


def _excludes(said: Described, plan: Plan) -> Iterator[str]:
    """Where an exclude list names what is quantized, or does not name a linear that is not."""
    items = [item for item in plan.items if _is_multiplied(item.source.canonical, said, plan) and not item.form]
    left = {module for item in items for module in modules(item.source, item.stacked) if plan.forms}
    for file, entries in said.excludes.items():
        named = {module for module in said.quantized | left if any(covers(entry, module) for entry in entries)}
        for module in sorted(named & said.quantized):
            yield f"{file} excludes {module}, whose {module}.weight is quantized"
        for module in sorted(left - named - said.quantized):
            yield f"{file} does not exclude {module}, whose {module}.weight is not quantized"


def _is_multiplied(canonical: str, said: Described, plan: Plan) -> bool:
    """Whether a weight is that of a linear layer that engines may quantize: without a list, no head and no router of DeepSeek's."""
    if canonical.endswith("output_layer.weight"):
        return not said.unlisted
    if canonical.endswith(".router.weight"):
        return not (said.unlisted and shape_of(plan.config).kv_lora)
    return is_linear_weight(canonical)


def unequal(found: Finished, plan: Plan) -> Iterator[str]:
    """Where linears that engines fuse do not share the numbers that these take one of for all."""
    items = {item.source.canonical: item for item in plan.items}
    groups = [[item] for item in plan.items] + [[items[name] for name in fused] for fused in plan.fused]
    for group in groups:
        parts = [name.removesuffix("weight") for item in group if item.form for name in item.source.names().values()]
        for suffix in group[0].form.shared if group[0].form else ():
            names = [prefix + suffix for prefix in parts if prefix + suffix in found]
            values = {n: float(found.read(n)) for n in names if torch.Size(found.shape(n)).numel() == 1}
            first = next(iter(values), "")
            for name, value in values.items():
                if value != values[first]:
                    yield f"{name} is {value:g}, but {first} {values[first]:g}: engines fuse both and take one for all"


def bad_numbers(found: Finished, name: str) -> list[str]:
    """NaN, Inf, and scales that are not above zero, in one tensor."""
    dtype = found.dtype(name)
    if dtype is torch.uint8 and is_scale(name):  # e8m0, whose zero is a power of two
        return [f"{name} holds NaN or Inf"] if any((strip == 0xFF).any() for strip in found.strips(name)) else []
    if dtype is None or not dtype.is_floating_point:
        return []
    problems = []
    for strip in found.strips(name):
        problems += [] if _finite(strip) else [f"{name} holds NaN or Inf"]
        if is_scale(name) and not (strip.float() > 0).all():
            problems.append(f"{name} holds a scale that is not above zero")
    return list(dict.fromkeys(problems))


def _finite(values: Tensor) -> bool:
    """Whether there is no NaN and no Inf. e4m3fn has no Inf, and NaN is the largest of its codes but for the sign."""
    if values.dtype is torch.float8_e4m3fn:
        return not (values.view(torch.uint8) & 0x7F == 0x7F).any()
    values = values.float() if values.dtype.itemsize == 1 else values
    return bool(values.isfinite().all()) if values.numel() < 2 else all(math.isfinite(one) for one in values.aminmax())
