"""Perplexity of exported checkpoints on held-out text, on the CPU, with the quantized arithmetic emulated.

    python examples/perplexity.py [--text FILE] [--windows N] CHECKPOINT [CHECKPOINT ...]

No low-precision kernel runs. A quantized linear multiplies, in float32, the decoded weight with activations that were
rounded as its `input_scale` says, and hands on bfloat16; keys and values are rounded to FP8 where the checkpoint has
scales for them. Everything else is transformers' own bfloat16 model. Engines round the same values but add in another
order, so expect their numbers close to these and not equal. The first checkpoint is what the others are compared with,
and its tokenizer serves for all.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from megatron_export.formats import FORMATS, nvfp4
from megatron_export.formats.fp8 import E4M3_MAX
from megatron_export.piece import Amax, Piece

WINDOW, BATCH = 512, 8
HELDOUT = Path(__file__).parent / "model" / "heldout.txt"
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
KV_SCALES = ("k_proj.k_scale", "v_proj.v_scale")
ATTENTION = "sdpa_rounded_kv"


def main() -> None:
    """Score each checkpoint and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoints", metavar="CHECKPOINT", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="default: the example model's held-out text")
    parser.add_argument("--windows", type=int, help=f"how many windows of {WINDOW} tokens; default: all there are")
    flags = parser.parse_args()
    windows = windows_of(flags.text, flags.checkpoints[0])[: flags.windows]
    if len(windows) < 2:
        raise SystemExit(f"{flags.text}: {len(windows)} windows of {WINDOW} tokens; a standard error needs two")
    width = max(len(str(path)) for path in flags.checkpoints)
    print(f"{len(windows)} windows of {WINDOW} tokens\n")
    print(f"{'checkpoint':{width}}  perplexity  change in nats  standard error")
    first = None
    for path in flags.checkpoints:
        losses = window_losses(load(path), windows)
        first = losses if first is None else first
        print(f"{path!s:{width}}  {math.exp(losses.mean()):10.4f}  {compared(losses - first)}", flush=True)


def compared(changes: Tensor) -> str:
    """The mean of paired changes of windows, and the standard error of that mean."""
    if not changes.any():
        return f"{0:14}  {'-':>14}"
    return f"{changes.mean():+14.5f}  {changes.std() / math.sqrt(len(changes)):14.5f}"


def windows_of(text: Path, checkpoint: Path) -> Tensor:
    """The text's tokens in rows of `WINDOW`; what does not fill a row is left out."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


@torch.no_grad()
def window_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window's tokens after its first, float64 [windows]."""
    means = []
    for batch in windows.split(BATCH):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        means.append(losses.double().mean(dim=1))
    return torch.cat(means)


def load(folder: Path) -> PreTrainedModel:
    """The transformers model of an exported folder, its quantized linears replaced by their emulation."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would look for a quantizer of its own
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION).eval()
    take_kv_scales(model, tensors)
    take_linears(model, tensors, algorithm(folder))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise SystemExit(f"{folder}: missing {sorted(set(missing) - tied)}, not in the model {sorted(unexpected)}")
    return model


def algorithm(folder: Path) -> str | None:
    """What hf_quant_config.json calls the format of the weights; None for bfloat16."""
    path = folder / "hf_quant_config.json"
    return json.loads(path.read_text())["quantization"].get("quant_algo") if path.exists() else None


def take_linears(model: nn.Module, tensors: dict[str, Tensor], algo: str | None) -> None:
    """Replace the tensors of every quantized linear by its decoded weight, and make it round its input."""
    form = next((form for form in FORMATS.values() if form.QUANTIZATION.get("quant_algo") == algo), None)
    if form is None:
        raise SystemExit(f"quant_algo {algo} is not known here; known are {', '.join(FORMATS)}")
    for name in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        weight = f"{name}.weight"
        pieces = {"weight": tensors[weight]}
        pieces |= {suffix: tensors.pop(f"{name}.{suffix}") for suffix in SCALES if f"{name}.{suffix}" in tensors}
        tensors[weight] = form.decode({suffix: Piece(tensor, ()) for suffix, tensor in pieces.items()})
        emulate(model.get_submodule(name), ROUND[form.NAME], pieces["input_scale"])


def emulate(linear: nn.Module, rounded: Callable[[Tensor, Tensor], Tensor], scale: Tensor) -> None:
    """Let a linear round its input and compute in float32; what it returns is bfloat16 as before."""
    linear.float()
    linear.register_forward_pre_hook(lambda module, args: (rounded(args[0], scale),))
    linear.register_forward_hook(lambda module, args, output: output.bfloat16())


def round_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Values as e4m3 with one scale would hold them, in float32."""
    return (values.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def round_nvfp4(values: Tensor, scale: Tensor) -> Tensor:
    """Values as NVFP4 would hold them, in float32: block scales are made as they come, the tensor's scale is given."""
    amax = scale * (nvfp4.E2M1_MAX * nvfp4.E4M3_MAX)
    return nvfp4.decode(nvfp4.encode(values.flatten(0, -2), Amax(amax, amax))).view(values.shape)


ROUND = {"fp8": round_fp8, "nvfp4": round_nvfp4}


def take_kv_scales(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Move the scales of keys and values from the tensors to the attention modules that they are for."""
    for name, module in model.named_modules():
        if all(f"{name}.{scale}" in tensors for scale in KV_SCALES):
            module.kv_scales = [tensors.pop(f"{name}.{scale}") for scale in KV_SCALES]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' own attention, after keys and values went through an FP8 cache if the module has scales."""
    if (scales := getattr(module, "kv_scales", None)) is not None:
        key, value = (round_fp8(x, scale).to(query.dtype) for x, scale in zip((key, value), scales, strict=True))
    return sdpa_attention_forward(module, query, key, value, *others, **options)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

if __name__ == "__main__":
    main()
