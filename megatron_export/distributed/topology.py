"""Which place a rank has among all ranks, as a value: nothing here asks Megatron or torch."""

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from .heartbeat import Pulse


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism cuts on this rank, that of the experts or that of all else: which shard of how many it
    holds, the group of those who hold the others, which of the replicas of these shards it is, and their group.
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
        return {
            "world": self.world,
            "tp": self.tp_size,
            "pp": self.pp_size,
            "vpp": self.vpp_size,
            "cp": self.cp_size,
            "dp": self.dp_size,
            "ep": self.ep_size,
            "etp": self.experts.size,
        }

    def cut(self, expert: bool) -> Cut:
        """How parameters of routed experts are cut here, or all others."""
        return self.experts if expert else Cut(self.tp_rank, self.tp_size, self.tp_group, self.dp_rank, self.dp_group)
