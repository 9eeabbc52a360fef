"""Where the parameters of an export come from. Nothing after the opening knows which of these it was.

A live model's origin stands in a module of its kind, which is imported where such a model is given.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from torch import Tensor, nn

from ..calibration.lookup import Statistics
from ..calibration.modelopt.inherited import check_blocks, inherited_from_checkpoint
from ..checkpoint.original import Original
from ..checkpoint.torch_dist import MegatronCheckpoint, MegatronCheckpointShards
from ..checkpoint.torch_dist_drafts import draft_beside
from ..common.errors import ExportError
from ..common.optional import part
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..hf.model import is_transformers
from ..hf.original import Tokenizer
from ..models import ignored
from ..planning.plan import Held, assumed
from ..planning.request import Request

Model = nn.Module | list[nn.Module]  # live: of Megatron, this rank's part, or its virtual pipeline stages
Settled = tuple[Request, Statistics | None]


class Origin(Protocol):
    """A model as an export sees it. Methods are collective, but for `check`."""

    def check(self, here: Topology, config: dict, request: Request) -> None:
        """Refuse what contradicts config.json or cannot be read; on this rank alone."""

    def inherit(self, here: Topology, config: dict, request: Request, given: Statistics | None) -> Settled:
        """The request and the statistics with what ModelOpt's quantizers say."""

    def held(self, here: Topology, config: dict, request: Request) -> dict[str, Held]:
        """Canonical name -> where the parameter lives."""

    def shards(self, here: Topology, config: dict, request: Request) -> Mapping[str, Tensor]:
        """Canonical name -> this rank's shard, with LoRA adapters merged where that is asked for."""

    def draft_beside(self, here: Topology, base: dict) -> "Beside | None":
        """The draft that the model has beside itself, None without one; `base` is the model's config.json."""


@dataclass(frozen=True)
class Beside:
    """A draft beside a model: which child of the model it is, its config.json, where its parameters come from, and what the user
    should know of it, a sentence each.
    """

    child: str
    config: dict
    origin: Origin
    remarks: tuple[str, ...] = ()


class LiveOrigin(Origin, Protocol):
    """A live model's origin."""

    def shapes(self, here: Topology, config: dict, request: Request) -> dict[str, tuple[int, ...]]:
        """Canonical name -> the shape of this rank's shard; on this rank alone."""

    def copied(self, config: dict) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the model that are copied as they are, whole."""


def live(model: Model) -> LiveOrigin:
    """The origin of a live model."""
    return _of_kind(model).Live(model)


def origin_of(model: Model | MegatronCheckpoint) -> Origin:
    """Where the parameters of what the user gave come from."""
    return Stored(model) if isinstance(model, MegatronCheckpoint) else live(model)


def world_of(model: Model | MegatronCheckpoint, timeout: float) -> AbstractContextManager[Topology]:
    """The ranks that export it, as `distributed.world.living` has them. Collective."""
    return _of_kind(model).world(model, timeout)


def original_of(
    model: Model | MegatronCheckpoint,
    hf_model: str | Path | None,
    tokenizer: Tokenizer | str | Path | None,
    mtp: str,
    into: Path | None,
) -> Original:
    """Config and tokenizer of what the user gave; those of a transformers model are put into the folder `into`, if there is one."""
    return _of_kind(model).original(model, hf_model, tokenizer, mtp, into)


def _of_kind(model: Model | MegatronCheckpoint) -> ModuleType:
    """What is known of live models of this kind: a module with their origin, `Live(model)`, `world` and `original`."""
    return part("export.transformers_model" if is_transformers(model) else "export.megatron_model")


@dataclass(frozen=True)
class Stored:
    """A Megatron checkpoint, of which each rank reads the shards that a model would have there, one after the other."""

    checkpoint: MegatronCheckpoint

    def check(self, here: Topology, config: dict, request: Request) -> None:
        if request.merge_lora:
            raise ExportError("merge_lora is a setting of the Checkpoint itself. Give it there, not to the export")

    def inherit(self, here: Topology, config: dict, request: Request, given: Statistics | None) -> Settled:
        with together(here, "read the checkpoint's quantizers"):
            return inherited_from_checkpoint(self.checkpoint, config, request, given)

    def held(self, here: Topology, config: dict, request: Request) -> dict[str, Held]:
        return self.checkpoint.held(here.sizes)

    def shards(self, here: Topology, config: dict, request: Request) -> Mapping[str, Tensor]:
        with together(here, "read the checkpoint's quantizers"):
            check_blocks(here, self.checkpoint, request)
        return MegatronCheckpointShards(self.checkpoint, self.checkpoint.held(here.sizes), here.rank, here.device)

    def draft_beside(self, here: Topology, base: dict) -> Beside | None:
        with together(here, "read the draft"):
            found = draft_beside(self.checkpoint.every, base)
            if found is None or self.checkpoint.child:
                return None
            child, config = found
            checkpoint = MegatronCheckpoint(self.checkpoint.folder, config, child=child)
            return Beside(child, config, Stored(checkpoint), ignored(child, checkpoint.every_quantizer))


@dataclass(frozen=True)
class Unbuilt:
    """A model that is yet to be built and filled: config.json and the topology say where its parameters will live; if `alone`, as
    if rank 0 had all of them.
    """

    pp_layout: str | None
    alone: bool = False

    def check(self, here: Topology, config: dict, request: Request) -> None:
        """Nothing is there that could contradict."""

    def inherit(self, here: Topology, config: dict, request: Request, given: Statistics | None) -> Settled:
        with together(here, "check the settings"):
            return request.plain(), given

    def held(self, here: Topology, config: dict, request: Request) -> dict[str, Held]:
        if self.alone:
            return assumed(config, 1, at_hand=False)
        sizes = {name: here.sizes[name] for name in ("pp", "ep", "vpp", "world")}
        return assumed(config, here.sizes["tp"], here.sizes["etp"], pp_layout=self.pp_layout, **sizes)

    def draft_beside(self, here: Topology, base: dict) -> Beside | None:
        return None
