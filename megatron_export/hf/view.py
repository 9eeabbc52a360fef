"""A transformers model as an export sees it: its tensors, where each HF tensor is among them, and its quantizers."""

import torch
from torch import Tensor, nn

from ..common.errors import ExportError, report
from ..distributed.topology import Topology
from ..models import head_of, shape_of
from .compressed import coded, uncompressed
from .names import disk_names, places_in, sources_in, spare_names
from .offloaded import fetchers_of
from .quantizers import Quantizers, by_part
from .tensors import Live, Parameters

_EMBEDDING = "embedding.word_embeddings.weight"


class View:
    """What there is of a model, or of a draft in one; nothing is copied, and no number is read.

    sources  canonical name -> parameter, of config.json's model
    live     the tensors by their names in memory
    places   HF tensor name -> where it is among them
    tables   the quantizers of the first, second and third layout part of each canonical module
    """

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor], quantizers: Quantizers, config: dict) -> None:
        self.config, self.sources = config, sources_in(config, tensors)
        self.live = Live(tensors, fetchers_of(module))
        for name, tensor in self.live.held.items():
            owner = f"{name.removesuffix('.weight')}.weight_quantizer"
            if (found := coded(name, tensor, quantizers.get(owner, {}))) is not None:
                self.live.codes[name] = found
                quantizers[owner] = uncompressed(quantizers[owner], found)
        self.places = places_in(config, self.live.held)
        self.tables: list[Quantizers] = by_part(self.sources, quantizers, self.places)

    def check(self) -> None:
        """`ExportError` for tensors that are no part of the architecture, or that cannot be read."""
        spare = spare_names(self.config, self.live.held, self.places)
        said = (
            "the model has a tensor {} that its config does not call for (and {} more). Give a model of its class alone"
        )
        report([said.format(name, len(spare) - 1) for name in spare[:1]])
        self.live.check()
        own = {on_disk: name for name, on_disk in disk_names(self.config, self.live.held).items()}
        head = own.get(head_of(self.config))
        if shape_of(self.config).tied and head:
            embedding = self.live.read(self.places[self.sources[_EMBEDDING].rule.hf].name)
            if not torch.equal(self.live.read(head).to(embedding.device), embedding):
                raise ExportError(
                    f"{head} is not equal to the embedding, to which the model's config ties it. Tie them with tie_weights(), or "
                    "set config.tie_word_embeddings to False"
                )

    def parameters(self, here: Topology, smoothed: dict[str, tuple[Tensor, Tensor]]) -> Parameters:
        """A rank's shards of the parameters by canonical name, some of them smoothed anew."""
        return Parameters(self.sources, self.places, self.live, (here.rank, here.device), smoothed)
