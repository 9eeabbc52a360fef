"""Which tensors share a file, which rank writes it, and in which order files grow.

A file holds whole parameters, with all that is made of them, so a parameter has one writer, and its bytes travel once. Files are
filled in order, as evenly as possible. A writer has `LANES` files that grow side by side, as a file system takes one file at
the speed of one core, from however many threads. If files are not small, their number is a multiple of `LANES`, so that no file is
left over alone.
"""

from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import itemgetter

from ..common.errors import ExportError
from .parameter import Item
from .row_strips import strips_of
from .tensor_spec import Output

BUCKET_BYTES = 64 << 20
LANES = 8
SMALL_BYTES = 500_000_000
MODES = ("rank0", "node", "all")


@dataclass(frozen=True)
class Bucket:
    """What is encoded and sent at a time: parameters of one file, or a strip of one, on their way to the rank that writes it."""

    items: tuple[Item, ...]
    writer: int


def files_of(items: Sequence[Item], copied: tuple[Output, ...], max_bytes: int) -> dict[str, tuple[Output, ...]]:
    """File name -> its tensors: at most `max_bytes`, or what must share a file and is larger."""
    groups, sizes = _groups(items)
    groups += [[output] for output in copied]
    sizes += [output.nbytes for output in copied]
    files = _filled(sizes, max_bytes)
    count = min(-(-len(files) // LANES) * LANES, max(len(files), sum(sizes) // SMALL_BYTES))
    even = -(-sum(sizes) // count)
    while even < max_bytes:
        if len(found := _filled(sizes, even)) <= count:
            files = found
            break
        even += max(even >> 6, 1)
    contents = [tuple(output for group in groups[file] for output in group) for file in files]
    if len(contents) == 1:
        return {"model.safetensors": contents[0]}
    return {f"model-{k:05d}-of-{len(contents):05d}.safetensors": file for k, file in enumerate(contents, start=1)}


def writers_of(
    files: dict[str, tuple[Output, ...]], items: Sequence[Item], mode: str, nodes: tuple[int, ...]
) -> dict[str, int]:
    """File name -> its writer: a rank that may write and holds most of the file; of several, the one with the least to write.

    By `mode`, rank 0 may write, or the first rank of each node, or all; `nodes` is the node of each rank.
    """
    if mode not in MODES:
        raise ExportError(f"writers must be one of {', '.join(MODES)}, not {mode!r}")
    if mode == "rank0":
        return dict.fromkeys(files, 0)
    firsts = {node: nodes.index(node) for node in nodes}
    holding: dict[str, dict[int, int]] = {file: defaultdict(int) for file in files}
    homes = _homes(files)
    for item in items:
        held = holding[homes[item.outputs[0].name]]
        share = item.nbytes // len(item.ranks)
        for rank in item.ranks:
            held[firsts[nodes[rank]] if mode == "node" else rank] += share
    given: dict[int, int] = defaultdict(int)
    found = {}
    for file, outputs in files.items():
        held = holding[file] or {0: 0}  # what is copied, nobody holds
        most = max(held.values())
        able = [rank for rank, nbytes in held.items() if nbytes >= 0.9 * most]
        found[file] = min(able, key=lambda rank: (given[rank], rank))
        given[found[file]] += sum(output.nbytes for output in outputs)
    return found


def buckets_of(
    items: Sequence[Item],
    files: dict[str, tuple[Output, ...]],
    writers: dict[str, int],
    limit: int | None = None,
    cut: Container[str] = (),
) -> tuple[Bucket, ...]:
    """Every item once, in the order of sending: a bucket for each lane of each writer in turn. A bucket has at most `limit` bytes
    (`BUCKET_BYTES` if it is None), or one larger item. Of those with a canonical name in `cut`, strips are taken where they can be.
    """
    homes, contents, known = _homes(files), defaultdict(list), {}
    limit = limit or BUCKET_BYTES
    for item in items:
        strips = strips_of(item, limit, known) if item.source.canonical in cut else (item,)
        contents[homes[item.outputs[0].name]] += strips
    lanes: dict[tuple[int, int], list[Bucket]] = defaultdict(list)
    begun: dict[int, int] = defaultdict(int)
    for file, writer in writers.items():
        lanes[begun[writer] % LANES, writer] += _cut(contents[file], writer, limit)
        begun[writer] += 1
    waiting = [lanes[key] for key in sorted(lanes)]
    rounds = max((len(lane) for lane in waiting), default=0)
    return tuple(lane[turn] for turn in range(rounds) for lane in waiting if turn < len(lane))


def _cut(items: list[Item], writer: int, limit: int) -> list[Bucket]:
    cuts: list[list[Item]] = []
    size = limit
    for item in items:
        nbytes = item.nbytes
        another = item.rows and item.rows[0]  # strip of the parameter whose strip came before
        if another or size + nbytes > limit:
            cuts.append([])
            size = 0
        cuts[-1].append(item)
        size += nbytes
    return [Bucket(tuple(cut), writer) for cut in cuts]


def _homes(files: dict[str, tuple[Output, ...]]) -> dict[str, str]:
    homes: dict[str, str] = {}
    for file, outputs in files.items():
        homes.update(zip(map(itemgetter(0), outputs), repeat(file)))  # by name
    return homes


def _groups(items: Sequence[Item]) -> tuple[list[list[Output]], list[int]]:
    """What must share a file, in order: the tensors of an item, and those of a module; and the bytes of each group."""
    groups: list[list[Output]] = []
    sizes: list[int] = []
    where: dict[str, int] = {}  # module -> its group
    whole: set[str] = set()  # tensors that are made of slices
    for item in items:
        stack = item.source.stack.name if item.stacked else ""
        modules = {stack} if stack else _modules(item)
        known = {where[module] for module in modules if module in where}
        home, *others = sorted(known) if known else (len(groups),)
        if not known:
            groups.append([])
            sizes.append(0)
        for other in others:
            groups[home] += groups[other]
            sizes[home] += sizes[other]
            groups[other] = []
            where |= {module: home for module, group in where.items() if group == other}
        for module in modules:
            where[module] = home
        if not item.stacked:
            groups[home] += item.outputs
            sizes[home] += item.nbytes
            continue
        begun = [output.whole for output in item.outputs if output.name not in whole]
        groups[home] += begun
        sizes[home] += sum(output.nbytes for output in begun)
        whole |= {output.name for output in item.outputs}
    kept = [number for number, group in enumerate(groups) if group]
    return [groups[number] for number in kept], [sizes[number] for number in kept]


def _modules(item: Item) -> set[str]:
    """The modules that its tensors are in."""
    if item.kv is None:  # what is made of a part stands beside it
        return {name.rpartition(".")[0] for name in item.source.names().values()}
    return {output.name.rpartition(".")[0] for output in item.outputs}


def _filled(sizes: list[int], max_bytes: int) -> list[slice]:
    """Runs of groups with at most `max_bytes`, or with one larger group."""
    cuts, start, size = [], 0, 0
    for number, nbytes in enumerate(sizes):
        if number > start and size + nbytes > max_bytes:
            cuts.append(slice(start, number))
            start, size = number, 0
        size += nbytes
    return [*cuts, slice(start, len(sizes))]
