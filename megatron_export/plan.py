"""What becomes what, in which order, between whom, in which file: decided from names and shapes, never from tensors.

Every rank computes the same plan, so all take the same branches and the same collectives in the same order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import ModuleType

from .errors import ExportError, report
from .formats import Form, Options, chosen, chosen_kv
from .formats.awq import SEARCHES, SHARED
from .item import Item, Output, Smoothed
from .names import Source, feeders_of, is_linear_weight, makes_keys, parameters_of, reads_heads
from .piece import Axis

BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class Held:
    """Where a canonical parameter lives: the global ranks of one tensor-parallel group in order, and a shard's shape."""

    ranks: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The whole export. `quantized` and `excluded` are HF module names; `files` maps a file name to its tensors."""

    config: dict
    form: Form
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
        return sum(part.nbytes for item in self.items for part in item.parts)


def make_plan(
    config: dict,
    held: dict[str, Held],
    *,
    format: str,
    options: Options = Options(),  # noqa: B008 - frozen
    kv_cache: str = "none",
    exclude: Iterable[str] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> Plan:
    """Plan the export of a model of config.json's dict whose parameters live as `held` says.

    Raises one `ExportError` with every reason why it cannot be done.
    """
    form, kv = chosen(format, options), chosen_kv(kv_cache)
    plain = not form.quantization
    sources = parameters_of(config)
    report(_held_problems(sources, held))
    if kv and plain:
        raise ExportError(
            f"--kv-cache {kv_cache} with --format {format}: vLLM refuses a checkpoint that quantizes the KV cache alone. "
            "Export without it, and serve with the engine's own FP8 KV cache"
        )
    linears = {module: name for name in sources if is_linear_weight(name) for module in _modules(sources[name])}
    left_alone, problems = _left_alone(linears, tuple(exclude), plain)
    smoothed = _smoothing(sources, left_alone, form)
    items = []
    for name, source in sources.items():
        quantized = is_linear_weight(name) and name not in left_alone and not plain
        item = Item(
            source,
            held[name].ranks if source.cut else held[name].ranks[:1],  # one of those that hold it whole is enough
            held[name].shape,
            form if quantized else None,
            kv if makes_keys(name) else None,
            gather_first=False,
            smoothed=smoothed.get(name, Smoothed()),
        )
        items.append(replace(item, gather_first=_straddles(item)))
        problems += _tile_problems(items[-1])
    if not plain and not any(item.form for item in items):
        problems.append("--exclude leaves nothing to quantize. Exclude less, or use --format bf16")
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


def _straddles(item: Item) -> bool:
    """Whether a tile of the format lies on two shards."""
    if item.form is None or len(item.ranks) == 1:
        return False
    tile = item.form.tile[0 if item.source.cut is Axis.OUT else 1]
    cut_sizes = [output.shape[output.axes.index(item.source.cut)] for output in item.raw_message(0)]
    return any(size % tile for size in cut_sizes)


def _smoothing(sources: dict[str, Source], left_alone: set[str], form: Form) -> dict[str, Smoothed]:
    """What AWQ does to each parameter: where the vector of every quantized linear divides, and what takes it over.

    A linear that the user left alone takes over nothing. What nothing takes over is written as `pre_quant_scale`, or,
    where the format has none, its linear is not smoothed.
    """
    how, smoothed = form.smoothing, {}
    if how is None:
        return smoothed
    for name in sources:
        if not is_linear_weight(name) or name in left_alone:
            continue
        feeders = [(feeder, part) for feeder, part in feeders_of(name) if feeder in sources]
        folded = all(not is_linear_weight(f) or (how.folds and f not in left_alone) for f, _ in feeders)
        search = how.search
        if reads_heads(name) and _queries_per_group(sources, feeders) > 1:
            folded = folded and not how.keeps
            search += SHARED if folded else ""
        if not folded and not how.keeps:
            continue
        module = name.removesuffix("weight")
        vector = f"{module}pre_quant_scale.{search}"
        own = replace(smoothed.get(name, Smoothed()), columns=vector, kept=not folded)
        if how.clip and SEARCHES[how.search].per_tensor:
            own = replace(own, ratio=f"{module}clip_ratio.{search}")
        elif how.clip:
            parts = sources[name].layout.parts
            own = replace(own, codes=tuple((part, f"{module}clip.{search}.{part}".rstrip(".")) for part in parts))
        smoothed[name] = own
        for feeder, part in feeders if folded else ():
            was = smoothed.get(feeder, Smoothed())
            smoothed[feeder] = replace(was, rows=(*was.rows, (part, vector)))
    return smoothed


def _queries_per_group(sources: dict[str, Source], feeders: list[tuple[str, str]]) -> int:
    return sources[feeders[0][0]].layout.queries_per_group


def _held_problems(sources: dict[str, Source], held: dict[str, Held]) -> list[str]:
    problems = [
        f"the model has no parameter {name}, which config.json calls for" for name in sources if name not in held
    ]
    problems += [
        f"the model has a parameter {name} that config.json does not call for" for name in held if name not in sources
    ]
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


def _left_alone(linears: dict[str, str], exclude: tuple[str, ...], plain: bool) -> tuple[set[str], list[str]]:
    """The canonical linears that `exclude` (globs over HF module names) takes out, and what is wrong with the globs."""
    known = (*linears, *_OUTSIDE_LAYERS)
    problems = [
        f"--exclude {glob!r} matches no module; they are named like {known[0]}"
        for glob in exclude
        if not any(fnmatchcase(module, glob) for module in known)
    ]
    if plain and exclude:
        problems.append("--exclude has no effect with --format bf16")
    out = {module for module in linears if any(fnmatchcase(module, glob) for glob in exclude)}
    touched = {linears[module] for module in out}
    for name in sorted(touched):
        fused = [module for module, owner in linears.items() if owner == name]
        if kept := [module for module in fused if module not in out]:
            problems.append(
                f"--exclude must name all of {', '.join(fused)}, which engines fuse: {', '.join(kept)} left out"
            )
    return touched, problems


def _tile_problems(item: Item) -> list[str]:
    if item.form is None or item.form.ragged:
        return []
    problems = []
    for part in item.parts:
        for size, block, axis in zip(part.shape, item.form.tile, ("outputs", "inputs"), strict=True):
            if size % block:
                smaller = "Give --group-size 64, or leave" if block == 128 and size % 64 == 0 else "Leave"
                problems.append(
                    f"{part.name} has {size} {axis}, which blocks of {block} ({item.form.name}) do not divide. "
                    f"{smaller} it in bfloat16 with --exclude {part.name.removesuffix('.weight')!r}"
                )
    return problems


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
