"""Which dialects of `quantization_config` are judged, which are only decoded, and which are not known here."""

from ..checkpoint.compressed_tensors import dialects_in
from ..checkpoint.dialects import Dialect
from ..checkpoint.hf_folder import of_the_whole
from ..common.errors import ExportError
from ..common.file_names import CONFIG
from ..common.safe_files import shown
from .detect_format import native_in
from .folder import Finished, json_of

COMPRESSED = "compressed-tensors"


def foreign(found: Finished) -> tuple[Dialect, ...]:
    """What a checkpoint of compressed-tensors keeps its weights in; () for one of this tool or of ModelOpt. `ExportError` for a
    checkpoint that is quantized in another dialect.
    """
    config = of_the_whole(json_of(found.folder, CONFIG))
    said = config.get("quantization_config")
    inner = said if isinstance(said, dict) else {}
    method, why = inner.get("quant_method"), ""
    if method == COMPRESSED:
        try:
            return dialects_in(config)
        except ValueError as error:
            why = f" ({error})"
    elif not isinstance(method, str) or not method or method.lower().startswith("modelopt") or native_in(inner):
        return ()
    raise ExportError(
        f"{found.folder} is quantized in the dialect {shown(method)}, which is not known here{why}, so it cannot be judged. Give a "
        "checkpoint of this tool or of ModelOpt"
    )


def check_judged(found: Finished) -> None:
    """Raise `ExportError` for a checkpoint that is quantized in a dialect in which it cannot be judged."""
    way = f"See how far it is from its original: megatron-export diff ORIGINAL {found.folder}"
    if foreign(found):
        raise ExportError(
            f"{found.folder} is quantized in the dialect {COMPRESSED!r}, which is decoded here but not judged. {way}"
        )
    blocks = (name for name in found if name.endswith(".weight_scale_inv"))
    odd = sorted(name for name in blocks if found.spelled(name) != "F32")
    if odd:
        raise ExportError(
            f"{found.folder}: {odd[0]} is {found.spelled(odd[0])}, not float32, so it cannot be judged which codes are the "
            f"nearest. {way}"
        )
