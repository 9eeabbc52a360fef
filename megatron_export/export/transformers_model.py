"""A live transformers model as an export sees it, and its ranks: imported where one is given."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ..calibration.lookup import Statistics
from ..calibration.modelopt.inherited_hf import inherited_from_transformers, smoothed_anew
from ..checkpoint.original import Original
from ..common.errors import ExportError
from ..distributed import world as worlds
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..hf.copied import copied_whole
from ..hf.drafts import draft_in, draft_of, own_tensors, settings_of
from ..hf.model import bare, device_of, tensors_of
from ..hf.original import Tokenizer, original_of
from ..hf.quantizers import quantizers_of
from ..hf.view import View
from ..models import HEADS, child_of, draft_config, ignored, of_linear, parameters_of, shape_of
from ..planning.plan import Held
from ..planning.request import Request
from .origins import Beside

Settled = tuple[Request, Statistics | None]


def world(model: nn.Module, timeout: float) -> AbstractContextManager[Topology]:
    """The ranks of torch.distributed, or this process alone."""
    return worlds.plain(timeout, device_of(model))


@dataclass(frozen=True)
class Live:
    """A transformers model, plain or with ModelOpt's quantizers; with `child`, the draft in it of that name."""

    model: nn.Module
    child: str = ""
    _seen: list[View] = field(default_factory=list)

    def view(self, config: dict) -> View:
        """What there is of the model; made once, as an export is of one config."""
        if not self._seen:
            self._seen.append(self._viewed(config))
        return self._seen[0]

    def check(self, here: Topology, config: dict, request: Request) -> None:
        if request.merge_lora:
            raise ExportError("merge_lora is for Megatron models. Merge adapters with merge_and_unload() of PEFT")
        self.view(config).check()

    def inherit(self, here: Topology, config: dict, request: Request, given: Statistics | None) -> Settled:
        view = self.view(config)
        with together(here, "read the model's quantizers"):
            weights = view.parameters(here, {}).piece
            return inherited_from_transformers(config, view.tables, weights, request, given)

    def held(self, here: Topology, config: dict, request: Request) -> dict[str, Held]:
        parameters = self.view(config).parameters(here, {})
        return {name: parameters.held(name) for name in parameters.homes}

    def shards(self, here: Topology, config: dict, request: Request) -> Mapping[str, Tensor]:
        view = self.view(config)
        return view.parameters(here, smoothed_anew(config, view.tables) if request.smoothed else {})

    def shapes(self, here: Topology, config: dict, request: Request) -> dict[str, tuple[int, ...]]:
        parameters = self.view(config).parameters(here, {})
        return {name: parameters.held(name).shape for name in parameters}

    def copied(self, config: dict) -> Iterator[tuple[str, Tensor]]:
        return copied_whole(bare(self.model), config)

    def _viewed(self, config: dict) -> View:
        model = bare(self.model)
        if self.child:
            draft, mapped = draft_of(model, self.child), "d2t" in parameters_of(config)
            view = View(draft, own_tensors(model, self.child, mapped), quantizers_of(draft), config)
            view.tables = [{name: one for name, one in table.items() if of_linear(name)} for table in view.tables]
            return view
        own = ("", HEADS) if shape_of(config).medusa else ("",)
        tensors = {name: tensor for name, tensor in tensors_of(model).items() if child_of(name) in own}
        quantizers = {name: found for name, found in quantizers_of(model).items() if child_of(name) in own}
        return View(model, tensors, quantizers, config)

    def draft_beside(self, here: Topology, base: dict) -> Beside | None:
        with together(here, "read the draft"):
            child = draft_in(self.model)
            if not child or self.child:
                return None
            config = draft_config(child, settings_of(self.model, child), base)
            remarks = ignored(child, quantizers_of(draft_of(self.model, child)))
            return Beside(child, config, Live(self.model, child), remarks)


def original(
    model: nn.Module,
    hf_model: str | Path | None,
    tokenizer: Tokenizer | str | Path | None,
    mtp: str,
    into: Path | None,
) -> Original:
    """What is beside the weights of a model, put into the folder `into`, if there is one."""
    return original_of(model, hf_model, tokenizer, mtp, into)
