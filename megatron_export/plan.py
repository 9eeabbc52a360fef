"""What becomes what, in which order, between whom, in which file: decided from names and shapes, never from tensors.

Every rank computes the same plan, so all take the same branches and the same collectives in the same order. Shapes are
not written down a second time: the plan runs the real surgery and the real encoders on meta tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import formats
from .errors import report
from .formats import FORMATS, KV_FORMATS, bf16
from .layout import Layout
from .names import Source, is_linear_weight, parameters_of, shape_of
from .piece import Amax, Axis, Piece, join

BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class Held:
    """Where a canonical parameter lives: the global ranks of one tensor-parallel group in order, and a shard's shape."""

    ranks: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """One tensor of the checkpoint, or of a message between ranks."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Item:
    """One canonical parameter and the HF tensors it becomes.

    `form` is the format it is quantized with, None for one that stays bfloat16; `kv` the format of the cache scales
    that go beside it. `gather_first`: a tile of the format straddles two shards, so the shards travel to the first
    rank in bfloat16 and are encoded there.
    """

    source: Source
    ranks: tuple[int, ...]
    shard_shape: tuple[int, ...]
    form: ModuleType | None
    kv: ModuleType | None
    gather_first: bool

    def split(self, shard: Tensor, index: int) -> dict[str, Piece]:
        """The bfloat16 part of every HF tensor that shard `index` holds, by HF tensor name."""
        parts = self.source.layout.split(shard, index, len(self.ranks))
        names = self.source.names()
        return {names[part]: bf16.encode(tensor)["weight"] for part, tensor in parts.items()}

    def encode(self, parts: dict[str, Piece], amax: Amax | None, kv_amax: tuple[Tensor, Tensor] | None) -> dict[str, Piece]:
        """HF parts (of one shard, or whole) -> the tensors of the checkpoint, by name."""
        encoded = {}
        for name, part in parts.items():
            if self.form is None:
                encoded[name] = part
                continue
            for suffix, piece in formats.encode(self.form, part.data, amax).items():
                encoded[name.removesuffix("weight") + suffix] = piece
        if self.kv is not None:
            attention = next(iter(parts)).rsplit(".", 2)[0]
            for name, scale in self.kv.encode(*kv_amax).items():
                encoded[f"{attention}.{name}"] = Piece(scale, ())
        return encoded

    def join(self, shards: list[dict[str, Piece]]) -> dict[str, Piece]:
        """Whole tensors from what the ranks sent, in shard order."""
        return {name: join([shard[name] for shard in shards if name in shard], self.source.cut) for name in shards[0]}

    def raw_message(self, index: int) -> tuple[Output, ...]:
        """What shard `index` sends to the first rank when the item is gathered first."""
        specs = _split_specs(self.source.layout, self.shard_shape, index, len(self.ranks))
        names = self.source.names()
        return tuple(Output(names[part], torch.bfloat16, shape, axes) for part, shape, axes in specs)

    def message(self, index: int) -> tuple[Output, ...]:
        """What shard `index` sends to the writer: tensors that do not follow the cut axis come from shard 0 alone."""
        if self.gather_first:
            return self.outputs if index == 0 else ()
        return tuple(o for o in self._encoded(self.raw_message(index)) if index == 0 or self.source.cut in o.axes)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The tensors of the checkpoint that this item becomes."""
        whole = self.join([_meta(self.raw_message(index)) for index in range(len(self.ranks))])
        parts = (Output(name, torch.bfloat16, tuple(p.data.shape), p.axes) for name, p in whole.items())
        return self._encoded(tuple(parts))

    def _encoded(self, parts: tuple[Output, ...]) -> tuple[Output, ...]:
        scalar = torch.empty((), device="meta")
        encoded: list[Output] = []
        kv = self.kv
        for part in parts if self.form else ():
            prefix = part.name.removesuffix("weight")
            encoded += [Output(prefix + suffix, *spec) for suffix, *spec in _encode_specs(self.form.NAME, part.shape)]
        encoded += parts if self.form is None else ()
        if kv is not None:
            attention = parts[0].name.rsplit(".", 2)[0]
            encoded += [Output(f"{attention}.{name}", s.dtype, (), ()) for name, s in kv.encode(scalar, scalar).items()]
        return tuple(encoded)


@dataclass(frozen=True)
class Plan:
    """The whole export. `quantized` and `excluded` are HF module names; `files` maps a file name to its tensors."""

    config: dict
    form: ModuleType
    kv: ModuleType | None
    items: tuple[Item, ...]
    buckets: tuple[tuple[Item, ...], ...]
    files: dict[str, tuple[Output, ...]]
    quantized: tuple[str, ...]
    excluded: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(output.nbytes for outputs in self.files.values() for output in outputs)

    @property
    def source_nbytes(self) -> int:
        """Bytes of the same model in bfloat16."""
        return sum(2 * torch.Size(shape).numel() for item in self.items for shape in _part_shapes(item))


def make_plan(
    config: dict,
    held: dict[str, Held],
    *,
    format: str,
    kv_cache: str = "none",
    exclude: Iterable[str] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> Plan:
    """Plan the export of a model of config.json's dict whose parameters live as `held` says.

    Raises one `ExportError` with every reason why it cannot be done.
    """
    form, kv = FORMATS[format], KV_FORMATS[kv_cache]
    sources = parameters_of(config)
    report(_held_problems(sources, held))
    linears = {module: name for name in sources if is_linear_weight(name) for module in _modules(sources[name])}
    left_alone, problems = _left_alone(linears, tuple(exclude), form)
    items = []
    for name, source in sources.items():
        quantized = is_linear_weight(name) and name not in left_alone and form is not bf16
        items.append(_item(source, held[name], form if quantized else None, kv if _makes_keys(name) else None))
        problems += _tile_problems(items[-1])
    report(problems)
    return Plan(
        config=config,
        form=form,
        kv=kv,
        items=tuple(items),
        buckets=_buckets(items),
        files=_files(items, max_shard_bytes),
        quantized=tuple(module for item in items if item.form for module in _modules(item.source)),
        excluded=tuple(sorted({*_OUTSIDE_LAYERS, *(m for m, name in linears.items() if name in left_alone)})),
    )


def assumed(config: dict, tp: int) -> dict[str, Held]:
    """Where parameters would live under tensor parallelism of `tp`, for a plan without a model."""
    held = {}
    for name, source in parameters_of(config).items():
        count = tp if source.cut else 1
        shape = list(source.shape)
        if source.cut:
            dim = 0 if source.cut is Axis.OUT else 1
            shape[dim] = -(-shape[dim] // count)
        held[name] = Held(tuple(range(count)), tuple(shape))
    return held


# Never quantized, and named to the engines, which would otherwise take the output layer for quantized.
_OUTSIDE_LAYERS = ("lm_head", "model.embed_tokens")


def _modules(source: Source) -> list[str]:
    return [name.removesuffix(".weight") for name in source.names().values()]


def _makes_keys(canonical: str) -> bool:
    return canonical.endswith("self_attention.linear_qkv.weight")


def _item(source: Source, held: Held, form: ModuleType | None, kv: ModuleType | None) -> Item:
    ranks = held.ranks if source.cut else held.ranks[:1]  # one of those that hold it whole is enough
    item = Item(source, ranks, held.shape, form, kv, gather_first=False)
    if form is None or len(ranks) == 1:
        return item
    tile = form.TILE[0 if source.cut is Axis.OUT else 1]
    cut_sizes = [output.shape[output.axes.index(source.cut)] for output in item.raw_message(0)]
    return replace(item, gather_first=any(size % tile for size in cut_sizes))


def _held_problems(sources: dict[str, Source], held: dict[str, Held]) -> list[str]:
    problems = [f"the model has no parameter {name}, which config.json calls for" for name in sources if name not in held]
    problems += [f"the model has a parameter {name} that config.json does not call for" for name in held if name not in sources]
    for name in sources.keys() & held.keys():
        source, shard = sources[name], held[name]
        dim = 1 if source.cut is Axis.IN else 0
        whole = list(shard.shape)
        whole[dim] *= len(shard.ranks) if source.cut else 1
        if source.padded and whole[0] >= source.shape[0]:
            whole[0] = source.shape[0]
        if tuple(whole) != source.shape:
            problems.append(
                f"{name} is {tuple(shard.shape)} on each of {len(shard.ranks)} ranks, but config.json means "
                f"{source.shape} in all"
            )
    return problems


def _left_alone(linears: dict[str, str], exclude: tuple[str, ...], form: ModuleType) -> tuple[set[str], list[str]]:
    """The canonical linears that `exclude` (globs over HF module names) takes out, and what is wrong with the globs."""
    known = (*linears, *_OUTSIDE_LAYERS)
    problems = [f"--exclude {glob!r} matches no module" for glob in exclude if not any(fnmatchcase(m, glob) for m in known)]
    if form is bf16 and exclude:
        problems.append("--exclude has no effect with --format bf16")
    out = {module for module in linears if any(fnmatchcase(module, glob) for glob in exclude)}
    touched = {linears[module] for module in out}
    for name in sorted(touched):
        fused = [module for module, owner in linears.items() if owner == name]
        if kept := [module for module in fused if module not in out]:
            problems.append(f"--exclude must name all of {', '.join(fused)}, which engines fuse: {', '.join(kept)} left out")
    return touched, problems


def _tile_problems(item: Item) -> list[str]:
    if item.form is None:
        return []
    block = item.form.TILE[1]
    return [
        f"{part.name} has {part.shape[1]} inputs, which blocks of {block} ({item.form.NAME}) do not divide. "
        f"Leave it in bfloat16 with --exclude {part.name.removesuffix('.weight')!r}"
        for part in item.raw_message(0)
        if part.shape[1] * (len(item.ranks) if item.source.cut is Axis.IN else 1) % block
    ]


def _part_shapes(item: Item) -> list[tuple[int, ...]]:
    whole = item.join([_meta(item.raw_message(index)) for index in range(len(item.ranks))])
    return [tuple(piece.data.shape) for piece in whole.values()]


def _meta(outputs: tuple[Output, ...]) -> dict[str, Piece]:
    return {o.name: Piece(torch.empty(o.shape, dtype=o.dtype, device="meta"), o.axes) for o in outputs}


@lru_cache(maxsize=None)
def _split_specs(layout: Layout, shape: tuple[int, ...], index: int, count: int) -> tuple:
    parts = layout.split(torch.empty(shape, dtype=torch.bfloat16, device="meta"), index, count)
    pieces = {part: bf16.encode(tensor)["weight"] for part, tensor in parts.items()}
    return tuple((part, tuple(piece.data.shape), piece.axes) for part, piece in pieces.items())


@lru_cache(maxsize=None)
def _encode_specs(form: str, shape: tuple[int, ...]) -> tuple:
    tile = FORMATS[form].TILE
    if any(size % block for size, block in zip(shape, tile, strict=True)):
        return ()  # reported as a problem, or gathered first
    scalar = torch.empty((), device="meta")
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    pieces = formats.encode(FORMATS[form], weight, Amax(scalar, scalar))
    return tuple((suffix, p.data.dtype, tuple(p.data.shape), p.axes) for suffix, p in pieces.items())


def _buckets(items: list[Item]) -> tuple[tuple[Item, ...], ...]:
    buckets: list[list[Item]] = [[]]
    size = 0
    for item in items:
        nbytes = sum(output.nbytes for output in item.outputs)
        if buckets[-1] and size + nbytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(item)
        size += nbytes
    return tuple(tuple(bucket) for bucket in buckets)


def _files(items: list[Item], max_bytes: int) -> dict[str, tuple[Output, ...]]:
    """Fill files in order, never parting a module from its scales; a module larger than the limit has its own file."""
    modules: dict[str, list[Output]] = {}
    for item in items:
        for output in item.outputs:
            modules.setdefault(output.name.rpartition(".")[0], []).append(output)
    files: list[list[Output]] = [[]]
    size = 0
    for outputs in modules.values():
        nbytes = sum(output.nbytes for output in outputs)
        if files[-1] and size + nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1] += outputs
        size += nbytes
    if len(files) == 1:
        return {"model.safetensors": tuple(files[0])}
    return {f"model-{k:05d}-of-{len(files):05d}.safetensors": tuple(file) for k, file in enumerate(files, start=1)}
