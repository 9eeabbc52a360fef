"""Where a live transformers model has each HF tensor: under its own name, or in a stack of experts as transformers 5 keeps them."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from ..models import Source, architecture_of, copied_prefixes, head_of, parameters_of, shape_of
from ..models.sources import expected_shapes
from ..models.stacked_names import Slice, stacked_names

Places = dict[str, Slice]  # HF tensor name -> the tensor in memory that it is, or is a part of


def places_in(config: dict, live: Collection[str]) -> Places:
    """HF tensor name -> where it is, of those that the model has; of experts whose files have stacks (Llama 4), the stack."""
    elsewhere, architecture = stacked_names(config), architecture_of(config)
    spelled = {architecture.name_on_disk(name): name for name in live} | {name: name for name in live}
    found = {}
    for name in expected_shapes(parameters_of(config).values()):
        place = Slice(name) if name in spelled else elsewhere.get(name, Slice(name))
        if place.name in spelled:
            found[name] = replace(place, name=spelled[place.name])
    return found


def homes_of(source: Source, places: Places) -> dict[str, Slice]:
    """Layout part of a parameter -> where it is, without copies of other tensors; {} if one is nowhere."""
    if source.stack:
        names = dict.fromkeys(source.layout.parts, source.stack.name)
    else:
        names = {part: name for part, name in source.names().items() if name not in source.copies()}
    return {part: places[name] for part, name in names.items()} if all(n in places for n in names.values()) else {}


def spare_names(config: dict, live: Iterable[str], places: Places) -> list[str]:
    """The tensors of a model that are no part of its architecture; not the output layer where the embedding is it."""
    used = {place.name for place in places.values()}
    tied = {head_of(config)} if shape_of(config).tied else set()
    return [name for name in live if name not in used | tied and not name.startswith(copied_prefixes(config))]
