"""The draft that ModelOpt puts into a transformers model: its settings, and its tensors as those of a model of its own."""

from torch import Tensor, nn

from ..models import HEADS, child_of, draft_kind, spelled
from ..models.drafts import check_single, settings_missing
from .model import bare, tensors_of

HEAD = "lm_head.weight"  # of a draft without one, the base's


def draft_in(model: nn.Module) -> str:
    """The child of a model that is a draft; "" without one. `ExportError` for several, and for one that is not exported."""
    found = [name for name, _ in bare(model).named_children() if child_of(name)]
    check_single(found)
    if not found:
        return ""
    draft_kind(found[0], tensors_of(draft_of(model, found[0])))
    return found[0]


def draft_of(model: nn.Module, child: str) -> nn.Module:
    """The module of a draft."""
    return bare(model).get_submodule(child)


def settings_of(model: nn.Module, child: str) -> dict:
    """What a draft's `eagle_config` or names say, in words of config.json; `rope_scaling` only if they are scaled."""
    model = bare(model)
    if counts := draft_kind(child, names := tensors_of(draft_of(model, child))).counts:
        return counts(names)
    if not hasattr(model, "eagle_config"):
        raise settings_missing(child)
    said = model.eagle_config.to_dict()
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    found = said | {"rope_scaling": rope if scaled else None}
    found["rope_theta"] = rope.get("rope_theta") or said.get("rope_theta")
    return found


def own_tensors(model: nn.Module, child: str, mapped: bool) -> dict[str, Tensor]:
    """The tensors of a draft by their names in it, with the base's output layer if it has none. `mapped`: it knows fewer tokens."""
    found = tensors_of(draft_of(model, child))
    if child == HEADS:
        return {spelled(name): one for name, one in found.items()}
    if HEAD not in found:
        found[HEAD] = bare(model).get_output_embeddings().weight
    if not mapped:
        found.pop("d2t", None)
    return found
