"""A checkpoint folder as a transformers model whose quantized arithmetic is emulated in plain torch, on any device.

A quantized linear keeps the tensors that it has on disk. When it is called, its bfloat16 input is multiplied by `pre_quant_scale`,
if there is one, and rounded as the format's `arithmetic` says; it is multiplied in float32 with the decoded weight; the product is
bfloat16. Keys and values are rounded where hf_quant_config.json says so. Quantized experts are linears of their own
(`emulated_experts.py`). Everything else is transformers' own bfloat16 model. Engines add in another order, so their numbers are
close to these and not equal.
"""

import sys
from collections.abc import Callable
from functools import partial, wraps
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.hf_folder import of_the_whole, quantized_as
from ..common.cpu_products import fast_products
from ..common.dtypes import SIZES
from ..common.errors import ExportError, report
from ..common.file_names import CONFIG, QUANT_CONFIG
from ..common.piece import Piece
from ..common.safe_files import headers, inside, not_read, read_table, reason_of, shown
from ..engines.quant_configs import MIXED, layers_of
from ..formats import ALGORITHMS, KV_FORMATS, PRE_QUANT_SCALE, SUFFIXES, Form, KvForm, module_of
from ..models import known
from .detect_format import claim_of, described
from .emulated_experts import take_apart
from .folder import Finished
from .transformers_names import Respelled, files_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LINEARS = ("_proj", "_proj_with_mqa", ".w1", ".w2", ".w3")  # the last words of linears in layers
KV_SCALES = {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"}


class EmulatedLinear(nn.Module):
    """A quantized linear, bfloat16 in and out, that decodes its weight whenever it is called."""

    def __init__(self, form: Form, tensors: dict[str, Tensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.form, self.arithmetic = form, form.arithmetic
        self.suffixes = tuple(tensors)
        for suffix, tensor in tensors.items():
            self.register_buffer(suffix, tensor, persistent=False)
        self.bias = bias

    def decoded(self) -> Tensor:
        """The weight that is multiplied with, float32 [out, in]."""
        pieces = {suffix: Piece(getattr(self, suffix), ()) for suffix in self.suffixes}
        return self.form.decode(pieces).to(self.arithmetic.torch_dtype).float()

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        buffers = dict(self.named_buffers())
        if PRE_QUANT_SCALE in buffers:
            inputs = inputs * buffers[PRE_QUANT_SCALE]
        rounded = self.arithmetic.inputs(inputs, buffers.get("input_scale"))
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(rounded, self.decoded(), bias).to(torch.bfloat16)


def load(folder: Path, device: torch.device | str = "cpu") -> "PreTrainedModel":
    """The (language) model of an exported folder, or of an original, whose weights are multiplied out if they are quantized; in
    evaluation mode. `ExportError` names tensors that are missing or extra.
    """
    from transformers import AutoConfig

    files = files_of(folder)
    form_of, cache = _algorithms(folder)
    scales = SUFFIXES if form_of else ()
    settings = of_the_whole(_table(folder, CONFIG))
    architecture = known(settings)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a wrong value leads to
        said = f"no config.json of a model that transformers knows ({reason_of(error)})"
        raise ExportError(f"{folder}: {said}") from error
    for one in (config, config.get_text_config()):
        if hasattr(one, "quantization_config"):
            del one.quantization_config  # transformers would look for a quantizer of its own
    tensors = Respelled(files, architecture, device)
    if settings.get("quantization_config") and not form_of and not quantized_as(folder, settings):
        tensors.multiply_out(settings)
    with torch.device(device):
        model = _model_of(config, tensors)
        take_apart(model, tensors, scales)
    model.set_attn_implementation(_attention_of(model))
    missing = _take_linears(model, tensors, form_of) if form_of else []
    missing += _take_kv_scales(model, tensors, cache) if cache else []
    wanted = model.state_dict()
    try:
        model.load_state_dict({name: tensors.take(name) for name in wanted if name in tensors}, strict=False)
    except RuntimeError as error:
        said = f"its tensors are not of the model in its config.json ({reason_of(error)})"
        raise ExportError(f"{folder}: {said}") from error
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing += [name for name in wanted if name not in tensors and name not in tied]
    report(
        [f"{folder}: tensor {name} is missing" for name in sorted({tensors.on_disk(name) for name in missing})]
        + [f"{folder}: tensor {name} is not expected by this model and its quant_algo" for name in sorted(tensors.left)]
    )
    model.forward = _fast(model.forward, device)
    return model


def _fast(forward: Callable, device: torch.device | str) -> Callable:
    """The same function, fast on any CPU that is `device`."""

    @wraps(forward)
    def called(*arguments: Any, **named: Any) -> Any:
        with fast_products(device):
            return forward(*arguments, **named)

    return called


def _model_of(config: "PreTrainedConfig", tensors: Respelled) -> "PreTrainedModel":
    """The model of a config, without what it sees with, which takes no part in text."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    for name, _ in list(model.base_model.named_children()):
        if tensors.is_copied(f"{model.base_model_prefix}.{name}."):
            delattr(model.base_model, name)
    return model


def _table(folder: Path, file: str) -> dict[str, Any]:
    """What a JSON file of a folder holds."""
    path = inside(folder, file)
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise not_read(path, "not JSON", error, "Fetch it again") from error


def _algorithms(folder: Path) -> tuple[Callable[[str], Form | None] | None, KvForm | None]:
    """How hf_quant_config.json says that linears are quantized, by HF module, and keys and values; None for not at all."""
    path = folder / QUANT_CONFIG
    said = _table(folder, path.name).get("quantization") if path.exists() else {}
    if not isinstance(said, dict):
        raise ExportError(f"{path}: quantization is {shown(said)}, not a table of settings. Fetch it again")
    caches = {cache.algorithm: cache for cache in KV_FORMATS.values() if cache}

    def known_as(key: str, name: object, table: dict) -> Any:
        if name is not None and (not isinstance(name, str) or name.upper() not in table):
            raise ExportError(f"{path}: {key} {shown(name)} is not known here; known are {', '.join(table)}")
        return None if name is None else table[name.upper()]

    cache, algorithm = known_as("kv_cache_quant_algo", said.get("kv_cache_quant_algo"), caches), said.get("quant_algo")
    if algorithm == MIXED:
        claims = layers_of(said)
        layers = {module: known_as(f"quant_algo of {module}", name, ALGORITHMS) for module, name in claims.items()}
        return partial(claim_of, layers), cache
    form = known_as("quant_algo", algorithm, ALGORITHMS)
    return (lambda module: form) if form else None, cache


def _take_linears(model: nn.Module, tensors: Respelled, form_of: Callable[[str], Form | None]) -> list[str]:
    """Move the tensors of quantized linears out of `tensors` into emulated ones; returns the names of missing ones."""
    missing = []
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not tensors.quantized(name, SUFFIXES):
            continue
        form = form_of(module_of(tensors.on_disk(f"{name}.weight"))[0])
        if form is None:
            continue
        suffixes = tuple(form.stored)
        missing += [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" not in tensors]
        wanted = [suffix for suffix in (*suffixes, PRE_QUANT_SCALE) if f"{name}.{suffix}" in tensors]
        taken = {suffix: tensors.take(f"{name}.{suffix}") for suffix in wanted}
        model.set_submodule(name, EmulatedLinear(form, taken, linear.bias))
    return missing


def _take_kv_scales(model: nn.Module, tensors: Respelled, cache: KvForm) -> list[str]:
    """Move the scales of keys and values to the attention modules they are for; returns the names of missing ones.

    Where the cache's format implies a scale, all of them may be missing.
    """
    missing, found = [], False
    for name, module in model.named_modules():
        if not any(hasattr(module, linear) for linear in ("k_proj", "qkv_proj")):
            continue
        for buffer, local in KV_SCALES.items():
            there = f"{name}.{local}" in tensors
            found |= there
            missing += [] if there else [f"{name}.{local}"]
            scale = (
                tensors.take(f"{name}.{local}") if there else torch.tensor(cache.implied or 1.0, device=model.device)
            )
            module.register_buffer(buffer, scale.reshape(()), persistent=False)
        module.kv_rounded = cache.rounded
    return missing if found or cache.implied is None else []


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
    rounded = module.kv_rounded(key, module.k_scale), module.kv_rounded(value, module.v_scale)
    return rounded[0].to(key.dtype), rounded[1].to(value.dtype)


def bits_per_weight(folder: Path, every: bool = False) -> float:
    """Bits of all tensors of quantized linears, with scales and `pre_quant_scale`, for each of their elements; 16.0 if none is.

    `every`: also of the linears of layers that stay in bfloat16.
    """
    modules: dict[str, dict[str, tuple[str, int]]] = {}
    for path in files_of(folder):
        for name, (spelled, shape) in headers(path).items():
            module, local = module_of(name)
            modules.setdefault(module, {})[local] = spelled, prod(shape) * SIZES.get(spelled, 0)
    bits, weights, forms = 0, 0, described(Finished(folder)).forms
    for module, tensors in modules.items():
        dtype, nbytes = tensors.get("weight", ("", 0))
        if (form := forms.get(module)) and dtype == form.stored["weight"].dtype:
            bits += 8 * sum(tensors[suffix][1] for suffix in ("weight", *SUFFIXES) if suffix in tensors)
            weights += 8 * nbytes // form.bits
        elif every and module.endswith(LINEARS) and ".layers." in module:
            bits, weights = bits + 8 * nbytes, weights + nbytes // 2
    return bits / weights if weights else 16.0
