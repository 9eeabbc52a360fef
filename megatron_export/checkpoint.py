"""A `torch_dist` checkpoint of Megatron-LM or Megatron-Bridge, seen as parameters under canonical names: the only reader of
Megatron checkpoints.

Its tensors are whole, whatever parallelism wrote them: each rank reads the rows and columns of its own shards. Layers that
are all alike share a tensor with an axis for them, `decoder.layers.mlp...`; else each has its own. So have experts, or their
gate and up have one each.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .claims import contradictions_of
from .errors import ExportError, report
from .layout import even_cut
from .names import MOST_PARAMETERS, Source, canonical, is_mtp, parameters_of, shape_of
from .piece import Axis
from .plan import Held, assumed
from .stored import METADATA, Storage, Stored
from .untrusted import inside, read_json, shown

_SETTINGS = "metadata.json"
TRACKER = "latest_checkpointed_iteration.txt"
_TRAINING = ("optimizer.", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")
_ALIKE = re.compile(r"decoder\.layers\.(?=[a-z])")
_EXPERTS = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(linear_fc[12]\.\w+?)(_[wv])?$")
_KINDS = {
    "fsdp_dtensor": "of Megatron-FSDP. Save it with --ckpt-format torch_dist, from a run without --use-megatron-fsdp",
    "torch_dcp": "of FSDP. Save it with --ckpt-format torch_dist",
    "zarr": "of an old Megatron-Core. Load it into the run that made it, and save it with --ckpt-format torch_dist",
}


def find_iteration(folder: Path, iteration: int | None) -> Path:
    """The folder of one iteration: number `iteration` of a checkpoint, or its latest one, or `folder` where it is one."""
    if not folder.is_dir():
        raise ExportError(f"--megatron-checkpoint {folder} is no folder. Give the one that --save of Megatron-LM named")
    if (folder / METADATA).exists() or (folder / _SETTINGS).exists() or _legacy(folder):
        if iteration is not None and folder.name != _name(iteration):
            raise ExportError(f"{folder} is one iteration already, not number {iteration}. Leave out --iteration")
        return _checked(folder)
    there = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"iter_\d+|release", path.name))
    choice = f"There are {', '.join(there)}" if there else "There is none"
    if iteration is not None:
        found = _name(iteration)
    elif (folder / TRACKER).is_file():
        with inside(folder, TRACKER).open("rb") as file:
            said = file.read(100).decode(errors="replace").strip()
        if said != "release" and not re.fullmatch(r"[0-9]{1,18}", said):
            raise ExportError(
                f"{folder / TRACKER} says {shown(said)}, no iteration. Choose one with --iteration. {choice}"
            )
        found = said if said == "release" else _name(int(said))
    else:
        raise ExportError(
            f"{folder} has no {TRACKER}. Choose an iteration with --iteration, if one is complete. {choice}"
        )
    if not (folder / found).is_dir():
        raise ExportError(f"{folder} has no {found}. {choice}")
    return _checked(folder / found)


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _legacy(folder: Path) -> bool:
    return any(folder.glob("mp_rank_*"))


def _checked(folder: Path) -> Path:
    """The folder of an iteration, if it is of the kind that is read here."""
    if _legacy(folder):
        raise ExportError(
            f"{folder} is a checkpoint of the old kind, a file for each rank (mp_rank_*), which only the run that made it can "
            "read. Convert it there with Megatron-LM's --ckpt-convert-format torch_dist --ckpt-convert-save DIR"
        )
    path = inside(folder, _SETTINGS)
    if not path.is_file():
        if (folder / METADATA).is_file():
            raise ExportError(f"{folder} has no {_SETTINGS}: it is a checkpoint {_KINDS['fsdp_dtensor']}")
        raise ExportError(f"{folder} is no checkpoint of Megatron: it has neither {_SETTINGS} nor {METADATA}")
    try:
        said = read_json(path)
        kind = said.get("sharded_backend") if isinstance(said, dict) else None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: not JSON ({error}). Copy the checkpoint again") from error
    if kind in _KINDS:
        raise ExportError(f"{folder} is a {kind} checkpoint {_KINDS[kind]}")
    if kind != "torch_dist":
        raise ExportError(f"{path}: sharded_backend is {shown(kind)}; only 'torch_dist' is read")
    if not (folder / METADATA).is_file():
        raise ExportError(
            f"{folder} has no {METADATA}, which is written last: saving it was interrupted. Give another one"
        )
    return folder


@dataclass(frozen=True)
class _Home:
    """Where some rows of a parameter lie: entry `lead` of a tensor's first axes."""

    tensor: Stored
    lead: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[len(self.lead) :]


class Checkpoint:
    """One iteration, whose names, shapes and settings are those that config.json means; else `ExportError` says all that is not.

    `config` is config.json's dict, without layers that predict one more token if they are to be left out (`mtp_dropped`).
    """

    def __init__(self, folder: Path, config: dict, *, mtp_dropped: bool = False, pp_layout: str | None = None) -> None:
        self.config, self.pp_layout = config, pp_layout
        self.sources = parameters_of(config)
        self.storage = Storage(folder, passed_over=_TRAINING)
        self._homes, problems = self._found(mtp_dropped)
        report(contradictions_of(self.storage, config, mtp_dropped) + problems)
        self.storage.check({id(home.tensor): home.tensor for homes in self._homes.values() for home in homes}.values())

    @property
    def folder(self) -> Path:
        """The folder of the iteration."""
        return self.storage.folder

    @property
    def nbytes(self) -> int:
        """Bytes read so far."""
        return self.storage.nbytes

    def held(self, sizes: dict[str, int]) -> dict[str, Held]:
        """Where its parameters would live in a model on a topology of these sizes: those ranks read them."""
        rest = {name: sizes[name] for name in ("pp", "ep", "vpp", "world")}
        return assumed(self.config, sizes["tp"], sizes["etp"], pp_layout=self.pp_layout, **rest)

    def shard(self, source: Source, shape: tuple[int, ...], index: int, count: int) -> Tensor:
        """Shard number `index` of `count` of a parameter, read from disk, as it is stored; rows that are not there are 0."""
        homes = self._homes[source.canonical]
        columns = slice(0, source.shape[1]) if len(source.shape) > 1 else None
        size = sum(home.shape[0] for home in homes)
        cuts = (slice(0, size),)
        if source.cut is Axis.IN:
            columns = even_cut(source.shape[1], index, count)
        elif source.cut and not (source.either and shape == source.shape):
            cuts = source.layout.rows(size, index, count, shape[0])
        shard, at = torch.empty(shape, dtype=homes[0].tensor.dtype), 0
        for home, rows in ((home, rows) for cut in cuts for home, rows in _rows(homes, cut)):
            after = at + rows.stop - rows.start
            self.storage.read(home.tensor, home.lead, rows, columns, shard[at:after])
            at = after
        shard[at:] = 0
        return shard

    def _found(self, mtp_dropped: bool) -> tuple[dict[str, tuple[_Home, ...]], list[str]]:
        """Where every parameter lies, and what is wrong with the names and shapes."""
        found: dict[str, dict[str, _Home]] = {}
        strange, twice = [], []
        numbers, experts = self._numbers(), range(shape_of(self.config).experts)
        for key, tensor in self.storage.tensors.items():
            if "_extra_state" in key or (mtp_dropped and key.startswith("mtp.")):
                continue
            for name, part, lead in _entries(key, tensor):
                try:
                    full = canonical(name, numbers, experts)
                except IndexError:  # a layer or an expert that config.json does not mean
                    full = name
                if full not in self.sources:
                    strange.append(name)
                elif part in found.setdefault(full, {}):
                    twice.append(full)
                else:
                    found[full][part] = _Home(tensor, lead)
        homes = {name: tuple(parts[part] for part in sorted(parts, reverse=True)) for name, parts in found.items()}
        lacking = [name for name in self.sources if name not in homes]
        problems, folder = [], self.folder
        if any(is_mtp(name, self.config) for name in lacking):
            problems.append(f"{folder} lacks layers that predict one more token, which config.json means: --mtp drop")
        problems += [f"{folder}: there is no {name}, which config.json calls for" for name in _alike(lacking)]
        problems += [
            f"{folder}: there is a tensor {name} that config.json does not call for" for name in _alike(strange)
        ]
        problems += [f"{folder}: two tensors are both {name}" for name in _alike(twice)]
        return homes, problems + _misshapen(self.sources, homes, folder)

    def _numbers(self) -> dict[str, list[int]]:
        """The numbers that layers have in config.json: of a `HybridModel`, two make one."""
        shape = shape_of(self.config)
        halves = 2 if "decoder.final_norm.weight" in self.storage.tensors else 1
        return {
            "decoder": [layer // halves for layer in range(shape.layers * halves)],
            "mtp": [shape.layers + layer for layer in range(shape.mtp)],
        }


class CheckpointShards(Mapping[str, Tensor]):
    """One rank's shards of a checkpoint by canonical name, each read from disk whenever it is asked for."""

    def __init__(self, checkpoint: Checkpoint, held: dict[str, Held], rank: int, device: torch.device) -> None:
        self.checkpoint, self.rank, self.device = checkpoint, rank, device
        self.held = {name: one for name, one in held.items() if rank in one.ranks}

    def __getitem__(self, name: str) -> Tensor:
        held, source = self.held[name], self.checkpoint.sources[name]
        return self.checkpoint.shard(source, held.shape, held.ranks.index(self.rank), len(held.ranks)).to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def _entries(key: str, tensor: Stored) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """What a tensor holds: the name that a model alone on its rank has for it, `_w` (gate) or `_v` (up) where it is a part of
    it, and where in the tensor's first axes it is.
    """
    layers, experts = _ALIKE.match(key), _EXPERTS.search(key)
    stacks = tensor.shape[: bool(layers) + bool(experts and experts[1] is None)]
    if len(stacks) == len(tensor.shape) or prod(stacks) > MOST_PARAMETERS:  # nothing that a model has
        yield key, "", ()
        return
    for lead in product(*map(range, stacks)):
        name, number = key, experts and (experts[1] or lead[-1])
        if layers:
            name = f"{layers[0]}{lead[0]}.{key[layers.end() :]}"
        if experts:
            name = _EXPERTS.sub(f"mlp.experts.local_experts.{number}.{experts[2]}", name)
        yield name, (experts and experts[3]) or "", lead


def _rows(homes: tuple[_Home, ...], cut: slice) -> Iterator[tuple[_Home, slice]]:
    """Where the rows `cut` of a parameter lie."""
    first = 0
    for home in homes:
        size = home.shape[0]
        rows = slice(max(cut.start - first, 0), min(cut.stop - first, size))
        if rows.start < rows.stop:
            yield home, rows
        first += size


def _misshapen(sources: dict[str, Source], homes: dict[str, tuple[_Home, ...]], folder: Path) -> list[str]:
    problems = []
    for name, parts in homes.items():
        source = sources[name]
        rows = sum(part.shape[0] for part in parts)
        if source.padded and rows > source.shape[0]:
            rows = source.shape[0]
        if {(rows, *part.shape[1:]) for part in parts} != {source.shape}:
            has = " and ".join(str(part.shape) for part in parts)
            problems.append(f"{folder}: {name} is {has}, but config.json means {source.shape}")
    return problems


def _alike(names: Iterable[str]) -> list[str]:
    """The first of the names that differ in numbers only, and how many more there are."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\d+", "0", name), []).append(shown(name)[1:-1])
    return [first if not more else f"{first} (and {len(more)} more like it)" for first, *more in found.values()]
