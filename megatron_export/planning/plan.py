"""What each parameter becomes, in which order, file and format, from which ranks: decided from names and shapes alone. So every
rank makes the same plan, and takes the same branches and collectives in the same order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from ..common.blocks import Blocks
from ..common.errors import ExportError, report
from ..common.garbage import no_garbage_collection
from ..common.piece import Axis
from ..common.text import parse_size
from ..formats import Form, KvForm
from ..models import Source, format_problems, keeps_keys, parameters_of, shape_of
from ..models.part_layouts import ByPart
from .awq_folding import clip_problems, smoothing
from .exclusions import modules, settle
from .item_kinds import item_of, tile_problems
from .kept_codes import keeps, kept_remarks
from .mxfp4_casts import cast_remarks, casts
from .parameter import Item
from .rank_placement import PAD_VOCAB_TO, grid_of
from .request import Request
from .shard_files import Bucket, buckets_of, files_of, writers_of
from .smoothed import UNSMOOTHED
from .tensor_spec import Output


@dataclass(frozen=True)
class Held:
    """Where a canonical parameter lives: the global ranks of one tensor-parallel group in order, and the shape of a shard.

    `odd` says what is wrong if the shards differ, `kind` the class of tensors that are read through their own `dequantize`; else
    they are "". `blocks`: how its codes share scales. `by_part`: its HF parts are cut one by one along `cut`, and not as Megatron
    cuts it. `at_hand`: the shards are in memory as they are, so that some rows of one can be read alone.
    """

    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    odd: str = ""
    kind: str = ""
    by_part: bool = False
    cut: Axis | None = None
    blocks: Blocks | None = None
    at_hand: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Plan:
    """The whole export.

    format   the name of the format or of the recipe
    layers   HF module -> the format that it is quantized to
    excluded HF modules that the configs must name as not quantized
    files    file name -> its tensors, in the order in which they are made
    writers  file name -> the rank that writes it
    buckets  what is encoded and sent at a time, each to one writer
    copied   tensors of the original model that are copied as they are
    fused    canonical linears that engines join into one, so that they share the amax of their weights
    remarks  sentences that tell the user what was not asked for
    """

    config: dict
    format: str
    kv: KvForm | None
    items: tuple[Item, ...]
    buckets: tuple[Bucket, ...]
    files: dict[str, tuple[Output, ...]]
    writers: dict[str, int]
    layers: dict[str, Form]
    excluded: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...] = ()
    remarks: tuple[str, ...] = ()
    copied: tuple[Output, ...] = ()

    @property
    def quantized(self) -> tuple[str, ...]:
        """HF modules."""
        return tuple(self.layers)

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        """The formats that something is quantized to; none for a plain model."""
        return tuple(dict.fromkeys(self.layers.values()))

    @property
    def awq(self) -> Form | None:
        """The one format whose weights AWQ prepares, if there is one."""
        return next((form for form in self.forms if form.smoothing), None)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(item.nbytes for item in self.items) + sum(output.nbytes for output in self.copied)

    @cached_property
    def source_nbytes(self) -> int:
        """Bytes of the same model in bfloat16."""
        return sum(item.source_nbytes for item in self.items) + sum(o.nbytes for o in self.copied)


@no_garbage_collection()
def make_plan(
    config: dict,
    held: dict[str, Held],
    request: Request,
    *,
    copied: tuple[Output, ...] = (),
    powers: frozenset[str] = frozenset(),
    wide: frozenset[str] = frozenset(),
    nodes: tuple[int, ...] = (),
) -> Plan:
    """Plan the export of a model.

    config   config.json's dict
    held     canonical name -> where the parameter lives
    request  what is asked for; its format and KV cache are settled
    copied   tensors of the original that are copied
    powers   names of HF weights whose values are e2m1 codes times a power of two that 32 inputs share, as MXFP4 has them
    wide     names of HF tensors that are float32 in the original, of those that stay as they are there
    nodes    the node of each rank; needed unless rank 0 writes all
    Raises one `ExportError` with every reason why the model cannot be exported so.
    """
    request = request if request.recipe_lines else request.plain()
    forms, kv = request.forms(), request.kv()
    plain = not any(form.quantization for form in forms.values())
    sources = {name: _as_held(source.as_stored(wide), held.get(name)) for name, source in parameters_of(config).items()}
    report(_held_problems(sources, held))
    if kv and plain:
        raise ExportError(
            f"--kv-cache {request.kv_cache} with --format {request.format}: vLLM refuses a checkpoint that quantizes the KV cache "
            "alone. Export without it, and serve with the engine's own FP8 KV cache"
        )
    if (
        kv
        and not any(keeps_keys(name, config) for name in sources)
        and (kv.implied is None or request.kv_scale != kv.implied)
    ):
        raise ExportError(
            f"--kv-cache {request.kv_cache}: engines cache the latent of this model's attention with a scale of 1, so there is no "
            "scale to export. Give --kv-cache fp8 --kv-scale 1, or start the engine with its own FP8 KV cache"
        )
    policy = settle(config, sources, request, forms, copied)
    problems = list(policy.problems) + _awq_problems(policy.forms.values())
    problems += clip_problems(sources, policy.forms)
    problems += [
        f"of {', '.join(fused)}, which share a scale, some are cut by tensor parallelism and others are not"
        for fused in policy.fused
        if len({sources[name].cut for name in fused}) > 1
    ]
    smoothed = smoothing(sources, policy.forms)
    cast = casts(sources, policy.forms, policy.fused, powers)
    items, firsts = [], {}
    for name, source in sources.items():
        item = item_of(
            firsts,
            source,
            held[name].ranks if source.cut else held[name].ranks[:1],  # one of those that hold it whole is enough
            held[name].shape,
            policy.forms.get(name),
            kv if kv and keeps_keys(name, config) else None,
            smoothed.get(name, UNSMOOTHED),
            stacked=policy.stacked and source.stack is not None,
            cast=name in cast,
        )
        kept = not request.merge_lora and keeps(item, held[name].blocks)
        items.append(replace(item, kept=True) if kept else item)
    odd = {id(first) for first in firsts.values() if tile_problems(first)}
    problems += [why for item in items if not item.first or id(item.first) in odd for why in tile_problems(item)]
    if not plain and not policy.forms and not problems:
        problems.append("--exclude leaves nothing to quantize. Exclude less, or use --format bf16")
    problems += format_problems(shape_of(config).medusa and shape_of(config).blocks, policy.forms, policy.left_alone)
    report(problems)
    files = files_of(items, copied, parse_size(request.max_shard_size))
    writing = writers_of(files, items, request.writers, nodes)
    cut = () if request.bucket_bytes else {name for name, one in held.items() if one.at_hand}
    return Plan(
        config=config,
        format=request.format,
        kv=kv,
        items=tuple(items),
        buckets=buckets_of(items, files, writing, request.bucket_bytes, cut),
        files=files,
        writers=writing,
        layers={module: item.form for item in items if item.form for module in modules(item.source, item.stacked)},
        excluded=policy.excluded,
        fused=policy.fused,
        remarks=policy.remarks
        + kept_remarks({name: one.kind for name, one in held.items() if one.kind}, items)
        + cast_remarks(items),
        copied=copied,
    )


def assumed(config: dict, tp: int, etp: int | None = None, *, at_hand: bool = True, **sizes: Any) -> dict[str, Held]:
    """Where parameters would live in a model that the command builds on a topology of these sizes (see `grid_of`)."""
    grid = grid_of(config, tp, etp, **sizes)
    padding = PAD_VOCAB_TO * tp

    @cache  # alike parameters of the same ranks share it
    def lives(ranks: range, whole: tuple[int, ...], padded: bool, cut: Axis | None) -> Held:
        shape = list(whole)
        if padded:
            shape[0] = -(-shape[0] // padding) * padding
        if cut:
            shape[0 if cut is Axis.OUT else 1] //= len(ranks)
        return Held(tuple(ranks), tuple(shape), at_hand=at_hand)

    return {
        name: lives(grid.ranks(source), source.shape, source.padded, source.cut)
        for name, source in parameters_of(config).items()
    }


def _awq_problems(forms: Iterable[Form]) -> list[str]:
    """What is wrong with several formats whose weights AWQ prepares."""
    found = list(dict.fromkeys(form.name for form in forms if form.smoothing))
    if len(found) < 2:
        return []
    return [
        f"{' and '.join(found)} in one recipe: each needs a search by AWQ of its own, and there is one. Choose one of them"
    ]


def _as_held(source: Source, held: Held | None) -> Source:
    """A parameter as this model holds it: cut by part, or whole where some layer specs cut it."""
    if held and held.by_part:
        layout = source.layout
        if held.cut is Axis.OUT and not source.padded:  # which a padded vocabulary has chunks in
            layout = ByPart(layout, source.shape[0])
        return replace(source, cut=held.cut, either=False, layout=layout)
    return replace(source, cut=None) if held and source.either and held.shape == source.shape else source


def _held_problems(sources: dict[str, Source], held: dict[str, Held]) -> list[str]:
    lacking, extra = sources.keys() - held.keys(), held.keys() - sources.keys()
    problems = [
        f"the model has no parameter {name}, which config.json calls for" for name in sources if name in lacking
    ]
    problems += [
        f"the model has a parameter {name} that config.json does not call for" for name in held if name in extra
    ]
    fitting: set[tuple] = set()  # of alike parameters, one is looked at
    for name in (name for name in sources if name in held):
        source, shard = sources[name], held[name]
        kind = id(shard), source.shape, source.cut, source.padded, id(source.layout)
        if kind in fitting:
            continue
        problems += [shard.odd] if shard.odd else []
        whole, count = list(shard.shape), len(shard.ranks)
        if source.cut:
            whole[1 if source.cut is Axis.IN else 0] *= count
        if source.padded and whole[0] >= source.shape[0]:
            whole[0] = source.shape[0]
        if type(source.layout) is ByPart and shard.shape[0] == source.layout.shard_rows(count):
            whole[0] = source.shape[0]
        if tuple(whole) != source.shape:
            has = f"{name} is {tuple(shard.shape)} on each of {count} ranks"
            problems.append(f"{has}, but config.json means {source.shape} in all")
        elif not shard.odd:
            fitting.add(kind)
    return problems
