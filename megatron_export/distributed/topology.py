"""The place of a rank among all ranks, as a value: nothing here asks Megatron or torch."""

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from .heartbeat import Pulse


@dataclass(frozen=True)
class Cut:
    """How parameters are cut on this rank, those of experts or all others: it holds shard `rank` of `size`, and `group` holds all
    of these; it is replica number `replica` of the ranks in `replicas`, which hold the same shard.
    """

    rank: int
    size: int
    group: ProcessGroup
    replica: int
    replicas: ProcessGroup


@dataclass(frozen=True)
class Topology:
    """One rank's place. Groups are torch process groups; `control` is a gloo group of all ranks for small messages.

    Data-parallel ranks include those of context parallelism, which hold the same weights too. `experts` is how routed
    experts are cut, `dispatch` the ranks among which a layer's tokens find their experts, `stage_group` all ranks of a
    pipeline stage, which hold the same layers.
    """

    rank: int
    world: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: ProcessGroup
    dp_group: ProcessGroup
    pp_size: int
    vpp_size: int
    cp_size: int
    ep_size: int
    experts: Cut
    dispatch: Cut
    stage_group: ProcessGroup
    control: ProcessGroup
    device: torch.device
    pulse: Pulse

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.rank == 0

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all parallelisms."""
        sizes = {kind: getattr(self, f"{kind}_size") for kind in ("tp", "pp", "vpp", "cp", "dp", "ep")}
        return {"world": self.world, **sizes, "etp": self.experts.size}

    def cut(self, expert: bool) -> Cut:
        """How parameters are cut here: those of routed experts if `expert`, else all others."""
        return self.experts if expert else Cut(self.tp_rank, self.tp_size, self.tp_group, self.dp_rank, self.dp_group)
