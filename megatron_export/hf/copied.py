"""The tensors of a transformers model that have no place in Megatron's, as those of a vision tower: they are copied as they are."""

from collections.abc import Iterator

from torch import Tensor, nn

from ..models import child_of, copied_prefixes, head_of
from .dtensors import full_of
from .model import tensors_of
from .names import disk_names, places_in
from .offloaded import fetchers_of
from .tensors import Live


def copied_tensors(model: nn.Module, config: dict) -> dict[str, Tensor]:
    """HF name -> tensor, as the model has it: of a shard, or on meta, if it is so."""
    return {on_disk: tensor for on_disk, (_, tensor) in _copied(model, config).items()}


def _copied(model: nn.Module, config: dict) -> dict[str, tuple[str, Tensor]]:
    """HF name -> name in memory, and tensor."""
    if not (prefixes := copied_prefixes(config)):
        return {}
    held = tensors_of(model)
    used = {place.name for place in places_in(config, held).values()}
    found = {on_disk: name for name, on_disk in disk_names(config, held).items() if name not in used}
    return {
        on_disk: (found[on_disk], held[found[on_disk]])
        for on_disk in sorted(found)
        if on_disk.startswith(prefixes) and on_disk != head_of(config) and not child_of(on_disk)
    }


def copied_whole(model: nn.Module, config: dict) -> Iterator[tuple[str, Tensor]]:
    """The same, one after the other, with their numbers and whole. Collective, if the model is cut over ranks."""
    found = _copied(model, config)
    live = Live(dict(found.values()), fetchers_of(model))
    for on_disk, (name, tensor) in found.items():
        yield on_disk, live.read(name) if live.spread(name) is None else full_of(tensor.detach())
