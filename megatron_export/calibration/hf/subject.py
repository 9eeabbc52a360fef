"""Runs a live transformers model for calibration, batch by batch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from ...common.errors import ExportError
from ...common.shards import Shards
from ...distributed import world
from ...distributed.collectives import everyone
from ...distributed.topology import Topology
from ...hf.dtensors import check_whole_when_called, local_of, reshard
from ...hf.model import bare, device_of, tensors_of
from ...hf.original import config_of
from ...hf.quantizers import quantizers_of
from ...models import shape_of
from ...models.hf_config import text_of
from ...models.layer_kinds import Kind
from ...models.layouts import QKV
from ...planning.request import SILENCE
from ..checks import LATENT, QUANTIZED, check_batches
from ..observer import Observer
from ..subject import Facts, evaluating
from .hooks import watched_cache, watching
from .linears import Linears


class Subject:
    """A transformers model, in one process or under FSDP2 (calibration/subject.py)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = bare(model)
        self.config = config_of(self.model)
        self.linears = Linears(self.model, self.config)

    def world(self) -> AbstractContextManager[Topology]:
        return world.plain(SILENCE, device_of(self.model), replicas=True)

    def check(self, here: Topology, batches: list[Tensor], searched: bool) -> None:
        check_batches(batches, shape_of(self.config).vocab)
        check_whole_when_called(self.model)
        Shards({name: local_of(tensor) for name, tensor in tensors_of(self.model).items()}).readable(here.device)
        if any(not quantizer["_disabled"] for quantizer in quantizers_of(self.model).values()):
            raise ExportError(QUANTIZED)
        if searched and shape_of(self.config).latent:
            raise ExportError(LATENT)

    @contextmanager
    def measured(self, here: Topology, batches: list[Tensor]) -> Iterator[Facts]:
        shapes = everyone(here, [tuple(batch.shape) for batch in batches])
        if len({len(theirs) for theirs in shapes}) > 1:
            raise ExportError(f"ranks have {sorted({len(theirs) for theirs in shapes})} batches. Give all as many")
        shape = shape_of(self.config)
        with evaluating(self.model.modules(), here.device):
            try:
                yield Facts(
                    weights=self.linears,
                    layouts=self.linears.layouts,
                    heads=QKV(shape.heads // shape.groups, shape.head_dim),
                    held_whole=set(),
                    experts=list(range(shape.experts)),
                    repeats=1,
                    groups=shape.groups,
                    topk=text_of(self.config).get("num_experts_per_tok") or 1,
                )
            finally:
                reshard(self.model)

    def run(
        self,
        here: Topology,
        batches: list[Tensor],
        steps: Iterator[Tensor],
        observer: Observer,
        all_experts: bool = False,
        head: bool = False,
        gradients: bool = False,
    ) -> None:
        shape = shape_of(self.config)
        cached = not (gradients or shape.kv_lora)
        keeping = self.model.config if shape.having(Kind.MAMBA, Kind.LINEAR) else None
        with watching(self.model, self.linears, observer, all_experts, head, gradients) as watch:
            for batch in islice(steps, len(batches)):
                ids = batch.to(here.device)
                given = {
                    "input_ids": ids,
                    "use_cache": True,
                    "past_key_values": watched_cache(watch if cached else None, keeping),
                }
                if gradients:
                    self._backward(given)
                    continue
                self.model(**given, logits_to_keep=0 if head else 1)

    def _backward(self, given: dict) -> None:
        """The gradients of activations by the loss, which is the sum over all tokens that have a next one."""
        asking = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            for parameter in asking:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                logits = self.model(**given).logits[:, :-1].flatten(0, 1).float()
                loss = torch.nn.functional.cross_entropy(logits, given["input_ids"][:, 1:].flatten(), reduction="sum")
                loss.backward()
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)
