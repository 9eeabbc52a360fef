"""Which linears stay in bfloat16 although the request quantizes them, because no engine, or not every one, loads them otherwise."""

from collections.abc import Iterable

from ..formats import VARIANTS, Form
from ..models import architecture_of, makes_keys, shape_of


def loadable(
    config: dict, found: dict[str, Form], quantize_mla: bool, insisted: set[str]
) -> tuple[dict[str, Form], list[str]]:
    """The same formats without those of linears that no engine, or not every one, would load; and sentences that say so.

    `insisted` are linears that the user quantizes by name.
    """
    remarks = []
    latent = {name for name in found if ".self_attention." in name} if shape_of(config).kv_lora else set()
    risky = {name for name in latent if not found[name].latent}
    if risky and not quantize_mla:
        others = dict.fromkeys(other.name for _, other in VARIANTS if other.latent and other.quantization)
        remarks.append(
            f"attention stays in bfloat16: not every engine loads latent attention in {_names(found, risky)} "
            f"(--quantize-mla quantizes it, --format {' or '.join(others)} always does)",
        )
        found = {name: form for name, form in found.items() if name not in risky}
    left = architecture_of(config).left
    unread = {
        n
        for n, form in found.items()
        if n.removesuffix(".weight").endswith(left.get(form.name, ())) and n not in insisted
    }
    if unread:
        remarks.append(f"{architecture_of(config).left_why} ({_names(found, unread)})")
        found = {name: form for name, form in found.items() if name not in unread}
    predicting = tuple(f"decoder.layers.{layer}." for layer in shape_of(config).predicting)
    if architecture_of(config).predicting and (later := {name for name in found if name.startswith(predicting)}):
        remarks.append(
            "layers that predict one more token stay in bfloat16: SGLang takes all of mtp.* for it, and ModelOpt writes them so"
        )
        found = {name: form for name, form in found.items() if name not in later}
    turned = architecture_of(config).turned
    keys = {name for name in found if makes_keys(name) and found[name].by_row} if turned else set()
    if keys:
        remarks.append(
            f"q, k and v stay in bfloat16: engines put the rows of q and k in another order, {_names(found, keys)}'s scales not"
        )
    if mixed := {name for name in found if name.endswith(".mixer.in_proj.weight") and found[name].tile[0] > 1}:
        remarks.append("Mamba's in_proj stays in bfloat16: engines cut its five parts by heads, not in whole blocks")
    return {name: form for name, form in found.items() if name not in keys | mixed}, remarks


def _names(found: dict[str, Form], linears: Iterable[str]) -> str:
    return " and ".join(sorted({found[name].name for name in linears}))
