"""Where the parameters of an export come from. Nothing after the opening knows which of these it was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..calibration.lookup import Statistics
from ..calibration.modelopt.inherited import check_blocks, inherited_from_checkpoint, inherited_from_model
from ..checkpoint.torch_dist import MegatronCheckpoint, MegatronCheckpointShards
from ..common.errors import ExportError, report
from ..common.shards import Shards
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..mcore.config_check import contradictions
from ..mcore.lora_merge import adapted
from ..mcore.model import Model, finish_gathering, shards_of
from ..models import is_mtp, settings_of, unscaled_rope_settings
from ..planning.plan import Held, assumed
from ..planning.request import Request
from . import transport

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


@dataclass(frozen=True)
class Live:
    """A Megatron-Core model: this rank's chunks of it."""

    model: Model

    def check(self, here: Topology, config: dict, request: Request) -> None:
        report(contradictions(self.model, settings_of(config), unscaled_rope_settings(config)))
        self.mine(here, config, request)

    def inherit(self, here: Topology, config: dict, request: Request, given: Statistics | None) -> Settled:
        finish_gathering(self.model)
        return inherited_from_model(here, self.model, config, request, given)

    def held(self, here: Topology, config: dict, request: Request) -> dict[str, Held]:
        return transport.locate(here, self.mine(here, config, request))

    def shards(self, here: Topology, config: dict, request: Request) -> Mapping[str, Tensor]:
        return adapted(here, self.model, self.mine(here, config, request), request.merge_lora)

    def mine(self, here: Topology, config: dict, request: Request) -> Shards:
        """Canonical name -> this rank's shard, without MTP layers if they are dropped. `ExportError` for what cannot be read."""
        dropped = request.mtp == "drop"
        mine = shards_of(self.model).named(lambda name: None if dropped and is_mtp(name, config) else name)
        return mine.readable(here.device)


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


@dataclass(frozen=True)
class Unbuilt:
    """A model that is yet to be built and filled: config.json and the topology say where its parameters will live."""

    pp_layout: str | None

    def check(self, here: Topology, config: dict, request: Request) -> None:
        """Nothing is there that could contradict."""

    def inherit(self, here: Topology, config: dict, request: Request, given: Statistics | None) -> Settled:
        with together(here, "check the settings"):
            return request.plain(), given

    def held(self, here: Topology, config: dict, request: Request) -> dict[str, Held]:
        sizes = {name: here.sizes[name] for name in ("pp", "ep", "vpp", "world")}
        return assumed(config, here.sizes["tp"], here.sizes["etp"], pp_layout=self.pp_layout, **sizes)
