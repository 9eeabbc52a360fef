"""What a finished folder must hold, from a plan: plain values that can be sent to another process."""

from collections import Counter
from dataclasses import dataclass

from ..common.file_names import CONFIG, QUANT_CONFIG
from .plan import Plan
from .quant_config import config_json, hf_quant_config
from .tensor_spec import Output


@dataclass(frozen=True)
class Contents:
    """What a finished folder must hold.

    files      file name -> its tensors
    slices     tensor -> the number of slices that it is made of; 1 if it is made whole
    copied     names of the tensors that come from the original model
    quantized  HF module names
    jsons      file name -> its content: config.json, and hf_quant_config.json if anything is quantized
    """

    files: dict[str, tuple[Output, ...]]
    slices: dict[str, int]
    copied: frozenset[str]
    quantized: tuple[str, ...]
    jsons: dict[str, dict]

    @property
    def homes(self) -> dict[str, str]:
        """Tensor -> its file."""
        return {output.name: file for file, outputs in self.files.items() for output in outputs}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.nbytes for outputs in self.files.values() for output in outputs)


def contents_of(plan: Plan) -> Contents:
    """What an export of a plan writes."""
    quant = hf_quant_config(plan)
    slices = Counter(output.name for item in plan.items for output in item.outputs)
    slices.update(output.name for output in plan.copied)
    return Contents(
        files=plan.files,
        slices=dict(slices),
        copied=frozenset(output.name for output in plan.copied),
        quantized=plan.quantized,
        jsons={CONFIG: config_json(plan)} | ({QUANT_CONFIG: quant} if quant else {}),
    )
