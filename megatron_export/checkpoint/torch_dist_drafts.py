"""The draft in a `torch_dist` checkpoint: keys that begin with a child of the model, and settings in ModelOpt's state."""

import copy
from pathlib import Path

from ..common.errors import ExportError
from ..models import HEADS, child_of, draft_config, draft_kind, megatron_llama3
from ..models.hf_config import text_of
from .torch_dist_settings import MODELOPT, modes_of
from .torch_dist_storage import Storage

_MODES = {
    "eagle_module": ("eagle", "eagle_architecture_config")
}  # the mode that makes a draft, and where its settings are


def own_part(storage: Storage, child: str, heads: bool = False) -> Storage:
    """The same storage with the keys of one child alone, without the child's name; with "", those of the model without drafts, but
    for Medusa's heads if `heads`.
    """
    part = copy.copy(storage)
    start, wanted = f"{child}." if child else "", {child, HEADS} if heads else {child}
    part.tensors, part.objects = (
        {key.removeprefix(start): one for key, one in some.items() if child_of(key) in wanted}
        for some in (storage.tensors, storage.objects)
    )
    return part


def draft_beside(storage: Storage, base: dict) -> tuple[str, dict] | None:
    """The child of the model that is a draft, and its config.json; None without a draft. `ExportError` for several, and for one
    that is not exported. `base` is the model's config.json.
    """
    found = sorted({child_of(key) for key in storage.tensors} - {""})
    if len(found) > 1:
        raise ExportError(f"{storage.folder} has several drafts, {' and '.join(found)}. Save a model with one of them")
    if not found:
        return None
    names = own_part(storage, found[0]).tensors
    if counts := draft_kind(found[0], names).counts:
        return found[0], draft_config(found[0], counts(names), base)
    return found[0], draft_config(found[0], _settings(storage.folder, found[0], text_of(base)), base)


def _settings(folder: Path, child: str, base: dict) -> dict:
    """What ModelOpt's state says of a draft, in words of config.json; sizes that it takes from the base are `base`'s."""
    mode, place = _MODES[child]
    said = next((settings.get(place) for name, settings in reversed(modes_of(folder)) if name == mode), None)
    if not isinstance(said, dict):
        raise ExportError(
            f"{folder} has {child}, and no {MODELOPT} beside it that says how the draft computes ({place}). Copy the whole folder "
            "of the iteration, or export the live model"
        )
    found = {"hidden_size": base["hidden_size"]} | said
    if not found.get("eagle_aux_hidden_state_layer_ids") and found.get("use_aux_hidden_state"):
        layers = base["num_hidden_layers"]  # ModelOpt's default
        found["eagle_aux_hidden_state_layer_ids"] = list({1, max(0, layers // 2 - 1), max(0, layers - 4)})
    rope = found.get("rope_scaling")
    factor = rope.get("factor") if isinstance(rope, dict) else None
    found["rope_scaling"] = megatron_llama3(factor) if factor else None
    return found
