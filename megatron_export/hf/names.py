"""Where a live transformers model has each HF tensor: under its own name, under that of transformers' modules, or in a stack of
experts as transformers 5 keeps them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from ..models import Source, architecture_of, copied_prefixes, head_of, parameters_of, shape_of
from ..models.sources import expected_shapes
from ..models.stacked_names import Slice, stacked_names

Places = dict[str, Slice]  # HF tensor name -> the tensor in memory that it is, or is a part of


def sources_in(config: dict, live: Mapping[str, Tensor]) -> dict[str, Source]:
    """Canonical name -> parameter, of config.json's model as these tensors have it: without stacks, where those in memory are not
    the stacks of files (Qwen3-VL's, whose [experts, inputs, outputs] transformers 5 turns).
    """
    sources = parameters_of(config)
    stacks = {source.stack.name for source in sources.values() if source.stack} & live.keys()
    on_disk = {name: shape for name, shape in expected_shapes(sources.values()).items() if name in stacks}
    # A stack may be square; that of the first and that of the second linears of a layer are not both.
    turned = [tuple(live[name].shape) != shape == _turned(live[name]) for name, shape in on_disk.items()]
    return {name: replace(source, stack=None) for name, source in sources.items()} if any(turned) else sources


def _turned(stack: Tensor) -> tuple[int, ...]:
    count, *sizes = stack.shape
    return (count, *sizes[::-1])


def disk_names(config: dict, live: Iterable[str]) -> dict[str, str]:
    """Name in memory -> how files spell it."""
    architecture = architecture_of(config)
    known = {*expected_shapes(parameters_of(config).values()), head_of(config)}
    return {
        name: name if name in known or name.startswith(architecture.copied) else architecture.name_on_disk(name)
        for name in live
    }


def places_in(config: dict, live: Mapping[str, Tensor]) -> Places:
    """HF tensor name -> where it is, of those that the model has; of experts whose files have stacks (Llama 4), the stack."""
    sources = sources_in(config, live)
    elsewhere = stacked_names(config, sources)
    own = {on_disk: name for name, on_disk in disk_names(config, live).items()}
    found = {}
    for name in expected_shapes(sources.values()):
        if name in own:
            found[name] = Slice(own[name])
        elif name in elsewhere and elsewhere[name].name in live:
            found[name] = elsewhere[name]
        elif name in elsewhere and elsewhere[name].name in own:
            found[name] = replace(elsewhere[name], name=own[elsewhere[name].name])
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
    passed = copied_prefixes(config)
    own = disk_names(config, live)
    return [name for name in own if name not in used and own[name] not in tied and not own[name].startswith(passed)]
