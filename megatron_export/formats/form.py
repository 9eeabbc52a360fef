"""What a format is to the rest of the program: a value with its name, its tile, its two functions and its descriptions."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..common.options import option
from ..common.piece import Amax, Piece


@dataclass(frozen=True)
class Options:
    """What the user can choose within a format. Each format says which of these it reads."""

    group_size: int = option(128, "inputs that share a scale, for int4_awq and w4a8_awq", choices=(128, 64))
    fp8_pb_spelling: str = option(
        "native",
        "native: weight_scale_inv, which vLLM, SGLang and TensorRT-LLM read; modelopt: FP8_PB_WO, which SGLang refuses",
        choices=("native", "modelopt"),
    )
    awq_output: str = option(
        "folded",
        "of nvfp4_awq. folded: plain NVFP4, for every engine; modelopt: o_proj keeps pre_quant_scale, for TensorRT-LLM",
        choices=("folded", "modelopt"),
    )
    awq_clip: bool = option(False, "AWQ formats: also search by how much to clip the weights")


@dataclass(frozen=True)
class Smoothing:
    """How AWQ prepares a format's weights.

    search  name of the search in `awq.SEARCHES` whose vectors it is smoothed with
    folds   whether a vector may be folded into a preceding linear, where that is exact, and not only into a norm
    keeps   whether a vector that is not folded is written as `pre_quant_scale`; otherwise its linear is not smoothed
    clip    whether the search's clipping is applied too
    done    whether the weights are smoothed already, as those of a model that ModelOpt calibrated are
    """

    search: str
    folds: bool
    keeps: bool
    clip: bool
    done: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Form:
    """One format with its options settled.

    tile          (out, in): the block of the weight that must not be cut before it is quantized
    encode        one linear -> pieces by suffix; pure
    decode        pieces -> the float32 weight that an engine multiplies with
    quantization  what the quantization configs say of it; empty for none
    stackable     whether the experts of a layer may be written as one tensor, of models that have them so
    activations   whether it needs the amax of the linear's input
    ragged        whether the last tile of a row or column may be partial
    numbers       how config.json describes its numbers in a config group; None for no such group
    native        config.json's whole `quantization_config`, where that is not ModelOpt's dialect
    """

    name: str
    tile: tuple[int, int]
    encode: Callable[[Tensor, Amax], dict[str, Piece]]
    decode: Callable[[dict[str, Piece]], Tensor]
    quantization: dict
    stackable: bool
    activations: bool = True
    ragged: bool = False
    numbers: dict | None = None
    native: dict | None = None
    smoothing: Smoothing | None = None

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is needed for the weights or the activations."""
        return self.activations or self.smoothing is not None
