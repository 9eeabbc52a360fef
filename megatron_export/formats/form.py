"""What a format is to the rest of the program: one value that says all of itself, and what follows from that."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..common.dtypes import SIZES, torch_dtypes
from ..common.options import option
from ..common.piece import Amax, Axis, Piece

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A vector of AWQ that the input is multiplied by: no format's own, written beside any.
PRE_QUANT_SCALE = "pre_quant_scale"
WHOLE_ROW = 1 << 31  # inputs of a tile: more than any row has, so that none is cut


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
    nvfp4_scales: str = option(
        "max",
        "of nvfp4, w4a16_nvfp4 and nvfp4_awq, for a block of weights. max: of its largest value; mse: of the least squared "
        "error; four_over_six: its largest value becomes 6 or 4, whichever errs less",
        choices=("max", "mse", "four_over_six"),
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


@dataclass(frozen=True)
class Native:
    """A dialect of config.json's `quantization_config` that is not ModelOpt's.

    config    the whole of it, but for the KV cache and what is excluded
    sign      the key by which it is told from others with the same `quant_method`
    excluded  what it always names as not quantized; None where that is the plan's to say
    alone     whether hf_quant_config.json is left out, because an engine would read that first
    """

    config: dict
    sign: str
    excluded: tuple[str, ...] | None = None
    alone: bool = False


@dataclass(frozen=True)
class Stacked:
    """How the experts of a layer are one tensor for each suffix, whose first dim is the expert.

    tails  suffix -> what follows the name of HF's stack; any other suffix but `weight` and `bias` follows it behind "_"
    codes  bytes of codes of a block, the last dim of [out, blocks, codes]; 0: an expert's tensors are [in, out], as HF's are
    """

    tails: dict[str, str]
    codes: int

    def name(self, stack: str, suffix: str) -> str:
        """The tensor of a suffix."""
        return stack + self.tails.get(suffix, "" if suffix in ("weight", "bias") else f"_{suffix}")

    def slice(self, rows: "Tensor", suffix: str) -> "Tensor":
        """An expert's slice of it, from the expert's rows [out, n], or [out]."""
        if self.codes:
            return rows.unflatten(1, (-1, self.codes)) if suffix == "weight" else rows
        return rows.T.contiguous() if rows.dim() == 2 else rows

    def slice_shape(self, rows: tuple[int, ...], suffix: str) -> tuple[int, ...]:
        """The shape of `slice`, from that of the rows."""
        if self.codes:
            return (rows[0], rows[1] // self.codes, self.codes) if suffix == "weight" else rows
        return rows[::-1]

    def rows(self, slice: "Tensor") -> "Tensor":
        """The inverse of `slice`."""
        if self.codes:
            return slice.flatten(1)
        return slice.T if slice.dim() == 2 else slice


AS_HF = Stacked({}, 0)  # as ModelOpt writes them


@dataclass(frozen=True)
class Arithmetic:
    """How an engine multiplies with a format, as `verify` emulates it.

    inputs  (input [..., in] of any float dtype, input_scale float32 [] or None) -> the float32 input that is multiplied
    weight  dtype that the decoded weight is rounded to before it is multiplied, as safetensors names it
    """

    inputs: "Callable[[Tensor, Tensor | None], Tensor]"
    weight: str

    @property
    def torch_dtype(self) -> "torch.dtype":
        """`weight`, as torch calls it."""
        return torch_dtypes()[self.weight]


@dataclass(frozen=True)
class Stored:
    """One tensor that a format makes of a weight.

    rows, columns  how many of the weight's one entry is about; None where the tensor does not follow that axis
    spaced         whether a dim of size 1 follows each dim
    """

    dtype: str
    rows: int | None = None
    columns: int | None = None
    spaced: bool = False

    @property
    def axes(self) -> tuple[Axis | None, ...]:
        """The weight axis that each dim follows; None of a dim of size 1."""
        followed = [axis for axis, each in ((Axis.OUT, self.rows), (Axis.IN, self.columns)) if each]
        return tuple(one for axis in followed for one in ((axis, None) if self.spaced else (axis,)))

    @property
    def dims(self) -> int:
        return len(self.axes)

    def shape(self, weight: tuple[int, int]) -> tuple[int, ...]:
        """Its shape, of a weight [out, in] whose last tile may be partial."""
        sizes = {Axis.OUT: -(-weight[0] // (self.rows or 1)), Axis.IN: -(-weight[1] // (self.columns or 1)), None: 1}
        return tuple(sizes[axis] for axis in self.axes)


ONE_NUMBER = Stored("F32")  # of a whole weight, or of its input


@dataclass(frozen=True, eq=False, kw_only=True)
class Form:
    """One format with its options settled. No field of a format's own has a default, so that what it does not say of itself
    is an error; docs/add-a-format.md has an example for each.

    name          what the user types
    tile          (out, in): the block of the weight that must not be cut before it is quantized
    ragged        whether the last tile of a row or column may be partial
    stored        what `encode` makes, by suffix. `weight` has the codes; the first suffix that begins with `weight_scale` the scale
                  of every block; a format that writes `input_scale` needs the amax of the input
    encode        one linear, bfloat16 [out, in] -> those pieces by suffix; pure
    decode        pieces -> the float32 [out, in] weight that an engine multiplies with
    requantize    (float32 [out, in] weight, pieces on disk) -> the float32 weight that `decode` would give, had these scales been
                  given codes of that weight. For the scales of `encode`, the result is that of `encode` and `decode` to the bit
    quantization  `quant_algo` and what stands beside it in both quantization configs; empty for none
    numbers       how config.json describes its numbers in a config group, of weights, and of inputs if these are measured; None for
                  no such group
    native        config.json's `quantization_config`, where that is not in ModelOpt's dialect; None where it is
    arithmetic    how an engine multiplies with it
    least_snr     signal to noise in dB below which a weight is broken rather than rounded, whatever the model
    latent        whether every engine loads latent attention in it; where not, that is quantized only if the user asks for it
    stack         how the experts of a layer are written as one tensor, of models that have them so; None for one by one
    no_experts    why no model with experts is written in it, and what to do instead, as sentences; "" where one is
    smoothing     how AWQ prepares its weights; None for not at all
    input_scale   what every `input_scale` is, where the request says so; None for that of the measured inputs
    scales        how the scales of its blocks are chosen, where that is an option of it
    """

    name: str
    tile: tuple[int, int]
    ragged: bool
    stored: dict[str, Stored]
    encode: "Callable[[Tensor, Amax], dict[str, Piece]]"
    decode: "Callable[[dict[str, Piece]], Tensor]"
    requantize: "Callable[[Tensor, dict[str, Piece]], Tensor]"
    quantization: dict
    numbers: dict | None
    native: Native | None
    arithmetic: Arithmetic
    least_snr: float
    latent: bool
    stack: Stacked | None
    no_experts: str
    smoothing: Smoothing | None
    input_scale: float | None = None
    scales: str = "max"

    @property
    def measured_as(self) -> str:
        """Its name with the options that change what it costs, for the names of statistics: `nvfp4_mse`; a given `input_scale` as
        the bits of a float32.
        """
        given = "" if self.input_scale is None else f"_input_{struct.pack('>f', self.input_scale).hex()}"
        return self.name + ("" if self.scales == "max" else f"_{self.scales}") + given

    @property
    def algorithm(self) -> str | None:
        """The `quant_algo` of both quantization configs; None for a format that quantizes nothing."""
        return self.quantization.get("quant_algo")

    @property
    def scale(self) -> str:
        """The suffix of the scales of blocks, of a format that quantizes."""
        return next(suffix for suffix in self.stored if suffix.startswith("weight_scale"))

    @property
    def shared(self) -> tuple[str, ...]:
        """The suffixes of numbers that engines take one of for all linears that they fuse. The one scale of a whole weight is none:
        they round to the largest.
        """
        return tuple(s for s, one in self.stored.items() if one.rows is one.columns is None and s != self.scale)

    @property
    def by_row(self) -> bool:
        """Whether a row's numbers have scales of their own, or bytes that they share with another row's."""
        return any(one.rows != (1 if suffix == "weight" else None) for suffix, one in self.stored.items())

    @property
    def activations(self) -> bool:
        """Whether it has a scale of the linear's input."""
        return "input_scale" in self.stored

    @property
    def measures(self) -> bool:
        """Whether it needs the amax of the linear's input."""
        return self.activations and self.input_scale is None

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is needed for the weights or the activations."""
        return self.measures or self.smoothing is not None

    @property
    def bits(self) -> int:
        """Of one code."""
        codes = self.stored["weight"]
        return 8 * SIZES[codes.dtype] // (codes.rows * codes.columns)


@dataclass(frozen=True, eq=False, kw_only=True)
class KvForm:
    """One format of the KV cache.

    name       what the user types
    algorithm  `kv_cache_quant_algo` of hf_quant_config.json
    scheme     `kv_cache_scheme` of config.json
    bits       of one number, by which a scheme that is a table is told from others
    implied    the scale that all engines take where the checkpoint has none; None where one of them needs it
    scales     the names of its scales under `self_attn`; float32 [] each
    encode     amax of the keys and of the values, float32 [] each -> those scales by name
    rounded    (keys or values [..., channels], their scale float32 []) -> what the cache holds of them, float32
    calibrated whether `encode` looks at the maxima
    """

    name: str
    algorithm: str
    scheme: dict | str
    bits: int
    implied: float | None
    scales: tuple[str, ...]
    encode: "Callable[[Tensor, Tensor], dict[str, Tensor]]"
    rounded: "Callable[[Tensor, Tensor], Tensor]"
    calibrated: bool = True


def not_rounded(values: "Tensor", scale: "Tensor | None" = None) -> "Tensor":
    """The values themselves, in float32: inputs of a format that quantizes weights alone."""
    return values.float()
