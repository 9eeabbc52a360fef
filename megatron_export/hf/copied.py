"""The tensors of a transformers model that have no place in Megatron's, as those of a vision tower: they are copied as they are."""

from collections.abc import Iterator

from torch import Tensor, nn

from ..models import child_of, copied_prefixes, head_of
from .dtensors import full_of
from .model import tensors_of
from .names import places_in
from .offloaded import fetchers_of
from .tensors import Live


def copied_tensors(model: nn.Module, config: dict) -> dict[str, Tensor]:
    """Name -> tensor, as the model has it: of a shard, or on meta, if it is so."""
    if not (prefixes := copied_prefixes(config)):
        return {}
    held = tensors_of(model)
    used = {place.name for place in places_in(config, held).values()} | {head_of(config)}
    return {
        name: held[name]
        for name in sorted(held)
        if name.startswith(prefixes) and name not in used and not child_of(name)
    }


def copied_whole(model: nn.Module, config: dict) -> Iterator[tuple[str, Tensor]]:
    """The same, one after the other, with their numbers and whole. Collective, if the model is cut over ranks."""
    live = Live(copied_tensors(model, config), fetchers_of(model))
    for name, tensor in live.held.items():
        yield name, live.read(name) if live.spread(name) is None else full_of(tensor.detach())
