"""A live Megatron-Core model as an export sees it, and its ranks: imported where one is given."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..calibration.lookup import Statistics
from ..calibration.modelopt.inherited import inherited_from_model
from ..calibration.modelopt.quantizers import Quantizers
from ..checkpoint.original import Original, read_original
from ..checkpoint.torch_dist import MegatronCheckpoint
from ..common.errors import ExportError, report
from ..common.shards import Shards
from ..distributed.collectives import everyone, together
from ..distributed.topology import Topology
from ..mcore import parallel_state
from ..mcore.addons import quantizers_below, quantizers_of
from ..mcore.config_check import contradictions
from ..mcore.drafts import MegatronDraft, draft_in, heads_of
from ..mcore.late_weights import finish_gathering
from ..mcore.lora_merge import adapted
from ..mcore.model import Model, chunks_of, shards_of, weights_of
from ..models import (
    draft_config,
    ignored,
    is_linear_weight,
    is_mtp,
    of_linear,
    parameters_of,
    settings_of,
    shape_of,
    unscaled_rope_settings,
)
from ..planning.plan import Held
from ..planning.request import Request
from . import transport
from .origins import Beside, Settled


def world(model: object, timeout: float) -> AbstractContextManager[Topology]:
    """The ranks of Megatron's parallel state, whatever the model."""
    return parallel_state.current(timeout)


def original(
    model: Model | MegatronCheckpoint, hf_model: str | Path | None, tokenizer: object, mtp: str, into: Path | None
) -> Original:
    """The HF model that the user names, or that Megatron-Bridge made the model of; `ExportError` where there is none."""
    if tokenizer is not None:
        raise ExportError("tokenizer is for transformers models. Of a Megatron model, hf_model has it")
    if hf_model is None and not isinstance(model, MegatronCheckpoint):
        hf_model = vars(chunks_of(model)[0].config).get("hf_model_id")  # of Megatron-Bridge
    if hf_model is None:
        raise ExportError(
            "hf_model is missing, and the model does not say which HF model it is. Give the folder or hub id of the one with its "
            "config and tokenizer"
        )
    return read_original(hf_model, mtp, weights=False, own=False)


@dataclass(frozen=True)
class Live:
    """A Megatron-Core model: this rank's chunks of it."""

    model: Model

    def check(self, here: Topology, config: dict, request: Request) -> None:
        report(contradictions(self.model, settings_of(config), unscaled_rope_settings(config)))
        self.mine(here, config, request)

    def inherit(self, here: Topology, config: dict, request: Request, given: Statistics | None) -> Settled:
        finish_gathering(self.model)
        heads = draft_in(self.model) if shape_of(config).medusa else None

        def quantizers() -> Quantizers:
            found = quantizers_of(self.model)
            return found | quantizers_below(heads.child, heads.module) if heads else found

        return inherited_from_model(here, quantizers, partial(weights_of, self.model), config, request, given)

    def held(self, here: Topology, config: dict, request: Request) -> dict[str, Held]:
        found = transport.locate(here, self.mine(here, config, request))
        if not request.merge_lora:
            return found
        return {name: replace(one, at_hand=False) for name, one in found.items()}  # a shard is merged whole

    def shards(self, here: Topology, config: dict, request: Request) -> Mapping[str, Tensor]:
        return adapted(here, self.model, self.mine(here, config, request), request.merge_lora)

    def shapes(self, here: Topology, config: dict, request: Request) -> dict[str, tuple[int, ...]]:
        return self.mine(here, config, request).shapes

    def draft_beside(self, here: Topology, base: dict) -> Beside | None:
        with together(here, "read the draft"):
            mine = draft_in(self.model)
            said = (mine.child, mine.settings()) if mine and mine.kind else None
            remarks = ignored(mine.child, quantizers_below(mine.child, mine.module)) if said else ()
        found, remarks = next((one for one in everyone(here, (said, remarks)) if one[0]), (None, ()))
        with together(here, "read the draft"):
            return Beside(found[0], draft_config(*found, base), LiveDraft(mine), remarks) if found else None

    def copied(self, config: dict) -> Iterator[tuple[str, Tensor]]:
        """None: those of the original do not change."""
        return iter(())

    def mine(self, here: Topology, config: dict, request: Request) -> Shards:
        """Canonical name -> this rank's shard, without MTP layers if they are dropped. `ExportError` for what cannot be read."""
        dropped = request.mtp == "drop"
        mine = shards_of(self.model).named(lambda name: None if dropped and is_mtp(name, config) else name)
        if shape_of(config).medusa:
            mine = Shards(mine.live | heads_of(self.model).live)
        return mine.readable(here.device)


@dataclass(frozen=True)
class LiveDraft:
    """The draft of a Megatron-Core model, on ranks of the last pipeline stage; on others None."""

    draft: MegatronDraft | None

    def check(self, here: Topology, config: dict, request: Request) -> None:
        self._mine(here, config)

    def inherit(self, here: Topology, config: dict, request: Request, given: Statistics | None) -> Settled:
        def quantizers() -> Quantizers:
            read = self.draft is not None and not self.draft.kind.counts  # Medusa's heads stay in bfloat16
            found = quantizers_of([self.draft.module]) if read else {}
            return {name: one for name, one in found.items() if of_linear(name)}

        def weights() -> Shards:
            mine = self._mine(here, config)
            return mine.named(lambda name: name.removesuffix(".weight") if is_linear_weight(name) else None)

        return inherited_from_model(here, quantizers, weights, config, request, given)

    def held(self, here: Topology, config: dict, request: Request) -> dict[str, Held]:
        return transport.locate(here, self._mine(here, config))

    def shards(self, here: Topology, config: dict, request: Request) -> Mapping[str, Tensor]:
        return self._mine(here, config)

    def draft_beside(self, here: Topology, base: dict) -> None:
        """A draft has none."""

    def _mine(self, here: Topology, config: dict) -> Shards:
        """Canonical name -> this rank's shard; without a map of tokens where the draft knows all of them."""
        if self.draft is None:
            return Shards({})
        mapped = "d2t" in parameters_of(config)
        found = self.draft.shards().named(lambda name: name if name != "d2t" or mapped else None)
        return found.readable(here.device)
