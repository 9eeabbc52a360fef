"""What ModelOpt and Megatron-Bridge leave in a `torch_dist` checkpoint beside the weights: LoRA adapters and quantizers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path

from .claims import MODELOPT, RUN_CONFIG, modes_of, run_of
from .errors import ExportError
from .homes import Home, by_rank, entries, home, in_order, part_of
from .names import without_additions
from .stored import Storage
from .untrusted import shown

_BRIDGE = re.compile(r"(.+?)(?:\.adapter)?\.linear_(in|out)\.weight")
_MODELOPT = re.compile(r"(.+)\.lora_(a|b)_(\w+)\.weight")
_HALVES = {"in": "first", "a": "first", "out": "second", "b": "second"}
_ONE_LAYER = re.compile(r"layers\.[\d\[?]")


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter on disk: `scale * second @ first` is added to a weight. first  [rank, in]; second  [out, rank]"""

    first: tuple[Home, ...]
    second: tuple[Home, ...]
    scale: float

    @property
    def rank(self) -> int:
        return self.first[0].shape[0]

    @property
    def homes(self) -> tuple[Home, ...]:
        return (*self.first, *self.second)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the second factor, and of the first."""
        return (sum(one.shape[0] for one in self.second), *self.second[0].shape[1:]), self.first[0].shape


def adapters_in(storage: Storage, canonical: Callable[[str], str], experts: int) -> dict[str, list[StoredAdapter]]:
    """Canonical weight -> its LoRA adapters, Megatron-Bridge's or ModelOpt's, in a model with so many experts in a layer.

    `canonical` makes the names of a model alone on its rank canonical. Raises for adapters that do something else than add a
    product of two matrices, or whose scale is told nowhere.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Home]]] = {}
    for key, tensor in storage.tensors.items():
        if without_additions(key) is not None or "_quantizer." in key:
            continue
        whole, part = part_of(key)
        match = _BRIDGE.fullmatch(whole) or _MODELOPT.fullmatch(whole)
        if match is None or ".adapter" in match[1]:
            raise ExportError(
                f"{storage.folder}: {shown(key)[1:-1]} is of an adapter that is not merged here, only the product of two matrices "
                "is. Merge it with the library that made it, and export the merged model"
            )
        owner, half, *label = match.groups()
        for name, lead in entries(f"{owner}.weight", tensor.shape, 2, experts):
            halves = found.setdefault((name, "".join(label)), {})
            halves.setdefault(_HALVES[half], {})[part] = home(tensor, lead)
    scale_of = _scales(storage.folder, {label for _, label in found})
    adapters: dict[str, list[StoredAdapter]] = {}
    for (name, label), halves in found.items():
        if len(halves) < 2:
            raise ExportError(
                f"{storage.folder}: half of the adapter of {shown(name)[1:-1]} is missing. Save the checkpoint again"
            )
        first, second = (in_order(halves[half]) for half in ("first", "second"))
        if label and ".linear_fc1." in name:  # which ModelOpt saves as if its rows were of one kind
            second = by_rank(second[0])
        scale = scale_of(name, label, first[0].shape[0])
        adapters.setdefault(canonical(name), []).append(StoredAdapter(first, second, scale))
    return adapters


def _scales(folder: Path, labels: set[str]) -> Callable[[str, str, int], float]:
    """What tells the scale of an adapter by its weight, its own name (Megatron-Bridge's have none) and its rank."""
    run = run_of(folder).get("peft") if "" in labels else None
    alpha = run.get("alpha") if isinstance(run, dict) else None
    modes = modes_of(folder) if labels - {""} else []
    settings = {str(found.get("adapter_name")): found.get("adapter_cfg") for mode, found in modes if mode == "peft"}

    def scale_of(name: str, label: str, rank: int) -> float:
        scales = _by_pattern(name.removesuffix(".weight"), settings.get(label)) if label else {alpha}
        if len(scales) != 1 or not all(type(scale) in (int, float) and isfinite(scale) for scale in scales):
            where = MODELOPT if label else f"peft.alpha in {RUN_CONFIG}"
            raise ExportError(
                f"{folder}: {where} does not say by how much the adapter of {shown(name)[1:-1]} is scaled. Copy the whole folder "
                "of the iteration"
            )
        (scale,) = scales
        return scale if label else scale / rank

    return scale_of


def _by_pattern(module: str, settings: object) -> set[object]:
    """The scales that ModelOpt's settings may give an adapter: those of patterns that name it, or single layers, whose numbers were
    those of a pipeline stage.
    """
    said = settings.items() if isinstance(settings, dict) else ()
    return {
        found.get("scale")
        for pattern, found in said
        if isinstance(found, dict) and (fnmatchcase(module, str(pattern)) or _ONE_LAYER.search(str(pattern)))
    }
