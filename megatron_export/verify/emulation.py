"""A checkpoint folder as a transformers model whose quantized arithmetic is emulated in plain torch, on any device.

No low-precision kernel runs. A quantized linear keeps the tensors that it has on disk. When it is called, its bfloat16
input is multiplied by `pre_quant_scale`, if there is one, which gives bfloat16 again; the input is rounded as the
format says; it is multiplied in float32 with the weight that the format's own `decode` gives; the product is bfloat16:

    quant_algo                    input                                             weight
    FP8, W4A8_AWQ                 e4m3, one scale: input_scale                      decoded
    NVFP4, NVFP4_AWQ              e2m1, blocks of 16 under input_scale              decoded
    FP8_PB_WO, FP8_BLOCK_SCALES   e4m3, by token and 128 channels: their amax/448   decoded
    W4A16_AWQ                     bfloat16                                          decoded, rounded to bfloat16

Keys and values are rounded to FP8 or NVFP4 where hf_quant_config.json says so, by k_scale and v_scale. Quantized experts are
linears of their own (`emulated_experts.py`), whatever the files call them (`transformers_names.py`). Everything else is
transformers' own bfloat16 model. Engines add in another order, so expect their numbers close to these and not equal.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.errors import ExportError, report
from ..common.piece import Amax, Piece
from ..common.safe_files import inside, opened, read_header, read_json, shown, told
from ..formats import chosen, nvfp4
from ..formats.fp8 import E4M3_MAX, scale_of
from ..formats.fp8_pb import BLOCK
from .detect_format import module_of
from .emulated_experts import take_apart
from .transformers_names import Respelled, files_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRE_QUANT_SCALE = "pre_quant_scale"
KV_SCALES = {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"}
CODED = {"U8": 2, "F8_E4M3": 1}  # as safetensors spells the dtype of a quantized weight: codes in a byte


def round_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Values as e4m3 holds them under a scale, in float32."""
    return (values.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def round_nvfp4(values: Tensor, scale: Tensor) -> Tensor:
    """Values as NVFP4 holds them in blocks of 16 of the last dim, in float32.

    The scale of a block is made as it comes: e4m3(block amax / (6 * scale)), 1 for zeros.
    """
    amax = scale * (nvfp4.E2M1_MAX * nvfp4.E4M3_MAX)
    return nvfp4.decode(nvfp4.encode(values.flatten(0, -2), Amax(amax, amax))).view(values.shape)


def round_fp8_groups(values: Tensor, scale: None = None) -> Tensor:
    """Values as e4m3 holds them under a scale of their own for every 128 of the last dim, in float32."""
    size = values.shape[-1]
    groups = nn.functional.pad(values.float(), (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    return round_fp8(groups, scale_of(groups.abs().amax(dim=-1, keepdim=True))).flatten(-2)[..., :size]


def not_rounded(values: Tensor, scale: None = None) -> Tensor:
    """The values themselves, in float32."""
    return values.float()


@dataclass(frozen=True)
class Algorithm:
    """What a `quant_algo` means for one linear.

    form     name of the format that decodes the weight
    scales   suffixes of the tensors that every quantized linear has beside `weight`
    rounded  (input, input_scale or None) -> float32 input, as the engine multiplies it
    product  what the decoded weight is rounded to before it is multiplied
    """

    form: str
    scales: tuple[str, ...]
    rounded: Callable[[Tensor, Tensor | None], Tensor]
    product: torch.dtype = torch.float32


_NVFP4 = Algorithm("nvfp4", ("weight_scale", "weight_scale_2", "input_scale"), round_nvfp4)
ALGORITHMS = {
    "FP8": Algorithm("fp8", ("weight_scale", "input_scale"), round_fp8),
    "FP8_PB_WO": Algorithm("fp8_pb", ("weight_scale",), round_fp8_groups),
    "FP8_BLOCK_SCALES": Algorithm("fp8_pb", ("weight_scale_inv",), round_fp8_groups),
    "NVFP4": _NVFP4,
    "NVFP4_AWQ": _NVFP4,
    "W4A16_AWQ": Algorithm("int4_awq", ("weight_scale",), not_rounded, torch.bfloat16),
    "W4A8_AWQ": Algorithm("w4a8_awq", ("weight_scale", "weight_scale_2", "input_scale"), round_fp8),
}
KV_ALGORITHMS = {"FP8": round_fp8, "NVFP4": round_nvfp4}
SUFFIXES = ("weight", PRE_QUANT_SCALE, *dict.fromkeys(s for algo in ALGORITHMS.values() for s in algo.scales))


class EmulatedLinear(nn.Module):
    """A quantized linear, bfloat16 in and out, that decodes its weight whenever it is called."""

    def __init__(self, algorithm: Algorithm, tensors: dict[str, Tensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.algorithm = algorithm
        self.suffixes = tuple(tensors)
        for suffix, tensor in tensors.items():
            self.register_buffer(suffix, tensor, persistent=False)
        self.bias = bias

    def decoded(self) -> Tensor:
        """The weight that is multiplied with, float32 [out, in]."""
        pieces = {suffix: Piece(getattr(self, suffix), ()) for suffix in self.suffixes}
        return chosen(self.algorithm.form).decode(pieces).to(self.algorithm.product).float()

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        buffers = dict(self.named_buffers())
        if PRE_QUANT_SCALE in buffers:
            inputs = inputs * buffers[PRE_QUANT_SCALE]
        rounded = self.algorithm.rounded(inputs, buffers.get("input_scale"))
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(rounded, self.decoded(), bias).to(torch.bfloat16)


def load(folder: Path, device: torch.device | str = "cpu") -> "PreTrainedModel":
    """The model of an exported folder, in evaluation mode. `ExportError` names tensors that are missing or extra.

    Of a model that sees it is the language model alone.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    files = files_of(folder)
    linears, cache = _algorithms(folder)
    _table(folder, "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a wrong value leads to
        raise ExportError(f"{folder}: no config.json of a model that transformers knows ({told(error)})") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would look for a quantizer of its own
    tensors = Respelled(files, config.model_type, device)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
        take_apart(model, tensors, linears.scales if linears else ())
    model.set_attn_implementation(_attention_of(model))
    missing = _take_linears(model, tensors, linears) if linears else []
    missing += _take_kv_scales(model, tensors, cache) if cache else []
    wanted = model.state_dict()
    try:
        model.load_state_dict({name: tensors.take(name) for name in wanted if name in tensors}, strict=False)
    except RuntimeError as error:
        raise ExportError(f"{folder}: its tensors are not of the model in its config.json ({told(error)})") from error
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing += [name for name in wanted if name not in tensors and name not in tied]
    report(
        [f"{folder}: tensor {name} is missing" for name in sorted({tensors.on_disk(name) for name in missing})]
        + [f"{folder}: tensor {name} is not expected by this model and its quant_algo" for name in sorted(tensors.left)]
    )
    return model


def _table(folder: Path, file: str) -> dict[str, Any]:
    """What a JSON file of a folder holds."""
    path = inside(folder, file)
    try:
        said = read_json(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: not JSON ({error}). Fetch it again") from error
    if not isinstance(said, dict):
        raise ExportError(f"{path}: {shown(said)}, not a table of settings. Fetch it again")
    return said


def _algorithms(folder: Path) -> tuple[Algorithm | None, Callable[[Tensor, Tensor], Tensor] | None]:
    """How hf_quant_config.json says that linears, and keys and values, are quantized; None for not at all."""
    path = folder / "hf_quant_config.json"
    said = _table(folder, path.name).get("quantization") if path.exists() else {}
    if not isinstance(said, dict):
        raise ExportError(f"{path}: quantization is {shown(said)}, not a table of settings. Fetch it again")
    found = []
    for key, table in (("quant_algo", ALGORITHMS), ("kv_cache_quant_algo", KV_ALGORITHMS)):
        name = said.get(key)
        if name is not None and (not isinstance(name, str) or name.upper() not in table):
            raise ExportError(f"{path}: {key} {shown(name)} is not known here; known are {', '.join(table)}")
        found.append(None if name is None else table[name.upper()])
    return found[0], found[1]


def _take_linears(model: nn.Module, tensors: Respelled, algorithm: Algorithm) -> list[str]:
    """Move the tensors of quantized linears out of `tensors` into emulated ones; returns the names of missing ones."""
    missing = []
    suffixes = ("weight", *algorithm.scales)
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not tensors.quantized(name, algorithm.scales):
            continue
        missing += [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" not in tensors]
        wanted = [suffix for suffix in (*suffixes, PRE_QUANT_SCALE) if f"{name}.{suffix}" in tensors]
        taken = {suffix: tensors.take(f"{name}.{suffix}") for suffix in wanted}
        model.set_submodule(name, EmulatedLinear(algorithm, taken, linear.bias))
    return missing


def _take_kv_scales(model: nn.Module, tensors: Respelled, rounded: Callable) -> list[str]:
    """Move the scales of keys and values to the attention modules they are for; returns the names of missing ones."""
    missing = []
    for name, module in model.named_modules():
        if not hasattr(module, "k_proj"):
            continue
        for buffer, local in KV_SCALES.items():
            there = f"{name}.{local}" in tensors
            missing += [] if there else [f"{name}.{local}"]
            scale = tensors.take(f"{name}.{local}") if there else torch.ones(())
            module.register_buffer(buffer, scale.reshape(()), persistent=False)
        module.kv_rounded = rounded
    return missing


def _attention_of(model: "PreTrainedModel") -> str:
    """Register transformers' attention with a quantized cache before it; returns its name, by which it has a mask too.

    That is sdpa, but where a model has its own alone, as GPT-OSS, whose softmax has an offset.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    for name, function, mask in (("sdpa", attention, sdpa_mask), ("eager", own_attention, eager_mask)):
        AttentionInterface.register(f"{name}_rounded_kv", function)
        AttentionMaskInterface.register(f"{name}_rounded_kv", mask)
    return "sdpa_rounded_kv" if model._supports_sdpa else "eager_rounded_kv"


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' own attention, after keys and values went through a quantized cache if the module has scales."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, *_cached(module, key, value), *others, **options)


def own_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """The same of the attention that stands beside the module in transformers."""
    theirs = sys.modules[type(module).__module__].eager_attention_forward
    return theirs(module, query, *_cached(module, key, value), *others, **options)


def _cached(module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if not hasattr(module, "kv_rounded"):
        return key, value
    return tuple(
        module.kv_rounded(each, scale).to(each.dtype)
        for each, scale in ((key, module.k_scale), (value, module.v_scale))
    )


def bits_per_weight(folder: Path) -> float:
    """Bits of all tensors of quantized linears, scales and `pre_quant_scale` too, for each of their weights.

    16.0 where no linear is quantized.
    """
    modules: dict[str, dict[str, tuple[str, int]]] = {}
    for path in files_of(folder):
        for name, said in _header(path).items():
            module, local = module_of(name)
            modules.setdefault(module, {})[local] = said
    bits = weights = 0
    for tensors in modules.values():
        dtype, nbytes = tensors.get("weight", ("", 0))
        if dtype in CODED:
            bits += 8 * sum(tensors[suffix][1] for suffix in SUFFIXES if suffix in tensors)
            weights += nbytes * CODED[dtype]
    return bits / weights if weights else 16.0


def _header(path: Path) -> dict[str, tuple[str, int]]:
    """Dtype and bytes of every tensor of a safetensors file, by name."""
    opened(path)
    said = read_header(path)
    said.pop("__metadata__", None)
    return {name: (one["dtype"], one["data_offsets"][1] - one["data_offsets"][0]) for name, one in said.items()}
