"""A checkpoint of Megatron-LM or Megatron-Bridge (`torch_dist`, or Megatron-FSDP's), seen as parameters under canonical names. Its
tensors are whole, whatever parallelism wrote them: each rank reads the rows and columns of its own shards.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ExportError, report
from ..common.piece import Axis
from ..common.safe_files import shown
from ..models import (
    HEAD,
    KINDS,
    Source,
    canonical,
    canonical_in,
    is_mtp,
    of_linear,
    parameters_of,
    shape_of,
    without_additions,
)
from ..models.layer_kinds import LETTERS, Kind
from ..models.lora import Adapter, merged, misfits
from ..planning.plan import Held, assumed
from .torch_dist_addons import StoredAdapter, adapters_in, is_adapter, quantizers_in
from .torch_dist_drafts import own_part
from .torch_dist_fsdp import joined, opened
from .torch_dist_keys import TRAINING, UNKNOWN_DELTA_NET, Home, alike, entries, home, in_order, part_of, spans
from .torch_dist_settings import contradictions_of, run_of
from .torch_dist_storage import Storage

_HEADS = (
    "output_layer.weight",
    "embedding.word_embeddings.weight",
)  # where the output layer is: in the latter if they are tied


class MegatronCheckpoint:
    """One iteration. `ExportError` lists all names, shapes and settings that are not as config.json means.

    `config` is config.json's dict; if `mtp_dropped`, without the layers that predict one more token. With `merge_lora`, the LoRA
    adapters in this checkpoint, or in the checkpoint `adapters` that has nothing else, are merged into the weights that are read;
    without it, there may be none.

    child  "" for the model itself; else the draft below that name, and `config` is its own
    """

    def __init__(
        self,
        folder: Path,
        config: dict,
        *,
        mtp_dropped: bool = False,
        pp_layout: str | None = None,
        merge_lora: bool = False,
        adapters: Path | None = None,
        child: str = "",
    ) -> None:
        self.folder, self.config, self.pp_layout, self.child = folder, config, pp_layout, child
        self._given = {
            "mtp_dropped": mtp_dropped,
            "pp_layout": pp_layout,
            "merge_lora": merge_lora,
            "adapters": adapters,
        }
        self.sources = parameters_of(config)
        passed_over = (*TRAINING, "mtp.") if mtp_dropped else TRAINING
        self.every = opened(folder, passed_over)
        shape = shape_of(config)
        self.storage = own_part(self.every, child, heads=bool(shape.medusa))
        self._experts, self._numbers = range(shape.experts), self._layers()
        self._beside = opened(adapters, passed_over) if adapters else self.storage
        runs = {storage: run_of(storage.folder) for storage in dict.fromkeys((self.storage, self._beside))}
        self._adapters = adapters_in(self._beside, runs[self._beside], self._full, shape.experts)
        self.adapted = bool(self._adapters)
        self._homes, problems = self._found()
        self._check_adapters(merge_lora)
        for storage, run in runs.items() if not child else ():
            problems = contradictions_of(storage, run, config, mtp_dropped) + problems
        whole = [name for name, homes in self._homes.items() if len(homes) == 1]
        problems += joined(self.storage, whole, config, runs[self.storage])
        report(problems + self._misfits())
        _check_tensors(self.storage, (one for homes in self._homes.values() for one in homes))
        _check_tensors(self._beside, (one for some in self._adapters.values() for each in some for one in each.homes))

    def of(self, config: dict) -> "MegatronCheckpoint":
        """The same iteration, read as another config.json means it."""
        return MegatronCheckpoint(self.folder, config, **self._given)

    @property
    def nbytes(self) -> int:
        """Bytes read so far."""
        return sum(storage.nbytes for storage in {self.storage, self._beside})

    def held(self, sizes: dict[str, int]) -> dict[str, Held]:
        """Where parameters would live in a model on a topology of these sizes: these ranks read them."""
        if self.child:  # a draft needs no more than one stage
            return assumed(self.config, sizes["tp"], at_hand=False)
        rest = {name: sizes[name] for name in ("pp", "ep", "vpp", "world")}
        return assumed(self.config, sizes["tp"], sizes["etp"], pp_layout=self.pp_layout, at_hand=False, **rest)

    def shard(self, source: Source, shape: tuple[int, ...], index: int, count: int) -> Tensor:
        """Shard `index` of `count` of a parameter, read from disk, in its dtype there; padding rows are 0."""
        shard = _read(self.storage, self._homes[source.canonical], source, shape, index, count)
        adapters = [self._adapter(one, source, shape, index, count) for one in self._adapters.get(source.canonical, ())]
        return merged(shard, adapters) if adapters else shard

    @cached_property
    def quantizers(self) -> dict[str, dict[str, Any]]:
        """ModelOpt's quantizers: canonical name -> attributes (see `quantizers_in`)."""
        found = self.every_quantizer
        return {name: one for name, one in found.items() if of_linear(name)} if self.child else found

    @cached_property
    def every_quantizer(self) -> dict[str, dict[str, Any]]:
        """The same, with those of a draft that an export does not look at."""
        return quantizers_in(self.storage, self._full, len(self._experts))

    def as_saved(self, name: str, amax: Home) -> Iterator[tuple[Tensor, Tensor]]:
        """The shards of a weight as the ranks that saved it had them, each with the amaxes of its blocks."""
        source, chunks = self.sources[name], sorted(amax.tensor.at(amax.lead), key=lambda chunk: chunk.offsets)
        axis = 1 if source.cut is Axis.IN else 0
        if source.shape[axis] % len(chunks):
            raise ExportError(f"{self.folder}: the amaxes of {name} are in {len(chunks)} parts, which do not divide it")
        shape = tuple(size // len(chunks) if at == axis else size for at, size in enumerate(source.shape))
        for index, chunk in enumerate(chunks):
            own = zip(chunk.offsets, chunk.sizes, strict=True)
            where = tuple(slice(start, start + size) for start, size in own)[len(amax.lead) :]
            part = torch.empty([cut.stop - cut.start for cut in where], dtype=amax.tensor.dtype)
            self.storage.read(amax.tensor, amax.lead, where, part)
            yield self.shard(source, shape, index, len(chunks)), part

    def _adapter(self, one: StoredAdapter, source: Source, shape: tuple[int, ...], index: int, count: int) -> Adapter:
        """The shards of an adapter's factors that belong to a shard of a weight."""
        rows = replace(source, shape=(source.shape[0], one.rank), cut=source.cut if source.cut is Axis.OUT else None)
        columns = replace(source, shape=(one.rank, source.shape[1]), cut=source.cut if source.cut is Axis.IN else None)
        first = _read(self._beside, one.first, columns, (one.rank, shape[1]), index, count)
        second = _read(self._beside, one.second, rows, (shape[0], one.rank), index, count)
        return Adapter(first, second, one.rank, one.scale)

    def _found(self) -> tuple[dict[str, tuple[Home, ...]], list[str]]:
        """Canonical name -> where the parameter lies; and what is wrong with names and shapes."""
        found: dict[str, dict[str, Home]] = {}
        folder = self.folder
        strange, twice = [], []
        for key, tensor in self.storage.tensors.items():
            unmapped = self.child and key == "d2t" and key not in self.sources  # of a draft that knows all tokens
            if "_extra_state" in key or without_additions(key) is None or unmapped:
                continue
            if UNKNOWN_DELTA_NET.search(key):
                raise ExportError(
                    f"{folder}: {shown(key)} is linear attention of another layout than Megatron-Core's, whose checkpoints have "
                    "its segments one by one (in_proj.weight.query and so on). Save the model with Megatron-Core's GatedDeltaNet, "
                    "with --ckpt-format torch_dist"
                )
            whole, part = part_of(key)
            for name, lead in entries(whole, tensor.shape):
                full = self._full(name)
                if full not in self.sources:
                    strange.append(name)
                elif part in found.setdefault(full, {}):
                    twice.append(full)
                else:
                    found[full][part] = home(tensor, lead)
        homes = {name: in_order(parts) for name, parts in found.items()}
        if self.child and HEAD in self.sources and HEAD not in homes:  # the draft computes with that of its base
            shared = next((self.every.tensors[key] for key in _HEADS if key in self.every.tensors), None)
            homes |= {HEAD: (home(shared, ()),)} if shared else {}
        lacking = [name for name in self.sources if name not in homes]
        problems = []
        if any(is_mtp(name, self.config) for name in lacking):
            problems.append(f"{folder} lacks layers that predict one more token, which config.json means: --mtp drop")
        problems += [f"{folder}: there is no {name}, which config.json calls for" for name in alike(lacking)]
        problems += [f"{folder}: there is a tensor {one} that config.json does not call for" for one in alike(strange)]
        problems += [f"{folder}: two tensors are both {name}" for name in alike(twice)]
        return homes, problems + _misshapen(self.sources, homes, folder)

    def _full(self, name: str) -> str:
        """The canonical name of `name` in a model alone on its rank; `name` itself if config.json means no such layer."""
        try:
            full = canonical(name, self._numbers, self._experts)
            return canonical_in(KINDS[self.child], full) if self.child else full
        except IndexError:
            return name

    def _layers(self) -> dict[str, list[int]]:
        """The numbers that layers have in config.json. A `HybridModel` has a layer for each block."""
        shape = shape_of(self.config)
        hybrid = "decoder.final_norm.weight" in self.storage.tensors
        of_blocks = [n for n, its in enumerate(shape.kinds[: shape.layers]) for kind in its if kind in LETTERS]
        return {
            "decoder": of_blocks if hybrid else list(range(shape.layers)),
            "mtp": list(shape.having(Kind.JOIN)),
            "last": list(shape.having(Kind.LAST)),
        }

    def _check_adapters(self, merge: bool) -> None:
        """Raise `ExportError` unless adapters are in one checkpoint, weights are there, and merging them was asked for."""
        folder, some = self._beside.folder, [one for adapters in self._adapters.values() for one in adapters]
        apart = self._beside is not self.storage
        if not some:
            if merge or apart:
                flag = "--lora-checkpoint" if apart else "--merge-lora"
                raise ExportError(f"{flag} has no effect: {folder} has no LoRA adapters. Leave it out")
            return
        said = f"LoRA adapters ({shown(some[0].first[0].tensor.key)[1:-1]}, {len(some)} in all)"
        if not self._homes:
            raise ExportError(
                f"{self.folder} has {said} and no weights, which are in the checkpoint that was trained further. Give that one as "
                "--megatron-checkpoint, and this one as --lora-checkpoint"
            )
        if apart and (weights := [key for key in self._beside.tensors if without_additions(key) is not None]):
            raise ExportError(
                f"{folder} has weights beside its adapters ({shown(weights[0])[1:-1]}). Give it as --megatron-checkpoint, with "
                "--merge-lora"
            )
        if apart and any(is_adapter(key) for key in self.storage.tensors):
            way_out = f"Give the checkpoint that those in {folder} were trained on"
            raise ExportError(f"{self.folder} has LoRA adapters of its own. {way_out}")
        if not merge and not apart:
            raise ExportError(
                f"{self.folder} has {said}, which an exported checkpoint has no place for. Merge them into the weights with "
                "--merge-lora"
            )

    def _misfits(self) -> list[str]:
        """What is wrong with the shapes of adapters, as sentences."""
        problems = []
        for name, adapters in self._adapters.items():
            if name not in self._homes or len(self.sources[name].shape) != 2:
                problems.append(f"there is a LoRA adapter of {name}, which is no matrix of this model")
                continue
            rows = sum(one.shape[0] for one in self._homes[name])
            for one in adapters:
                problems += misfits(name, (rows, self.sources[name].shape[1]), one.rank, *one.shapes)
        return [f"{self.folder}: {problem}" for problem in problems]


class MegatronCheckpointShards(Mapping[str, Tensor]):
    """Canonical name -> this rank's shard of a checkpoint, read from disk at every access."""

    def __init__(self, checkpoint: MegatronCheckpoint, held: dict[str, Held], rank: int, device: torch.device) -> None:
        self.checkpoint, self.rank, self.device = checkpoint, rank, device
        self.held = {name: one for name, one in held.items() if rank in one.ranks}

    def __getitem__(self, name: str) -> Tensor:
        held, source = self.held[name], self.checkpoint.sources[name]
        return self.checkpoint.shard(source, held.shape, held.ranks.index(self.rank), len(held.ranks)).to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def _read(
    storage: Storage, homes: tuple[Home, ...], source: Source, shape: tuple[int, ...], index: int, count: int
) -> Tensor:
    """Shard `index` of `count` of the matrix or vector at `homes`, which is cut as `source` is."""
    cuts, columns = source.share(sum(one.shape[0] for one in homes), shape, index, count)
    shard, at = torch.empty(shape, dtype=homes[0].tensor.dtype), 0
    for one, rows in ((one, rows) for cut in cuts for one, rows in spans(homes, cut)):
        after = at + rows.stop - rows.start
        storage.read(one.tensor, one.lead, (rows, *columns), shard[at:after])
        at = after
    shard[at:] = 0
    return shard


def _check_tensors(storage: Storage, homes: Iterable[Home]) -> None:
    storage.check({id(one.tensor): one.tensor for one in homes}.values())


def _misshapen(sources: dict[str, Source], homes: dict[str, tuple[Home, ...]], folder: Path) -> list[str]:
    problems = []
    for name, parts in homes.items():
        source = sources[name]
        rows = sum(part.shape[0] for part in parts)
        rows = min(rows, source.shape[0]) if source.padded else rows
        if {(rows, *part.shape[1:]) for part in parts} != {source.shape}:
            has = " and ".join(str(part.shape) for part in parts)
            problems.append(f"{folder}: {name} is {has}, but config.json means {source.shape}")
    return problems
