"""What is asked of an export. A field makes the command's flag, the library's keyword, and entries in fingerprint and manifest."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..common.errors import ExportError
from ..common.options import checked, made, option, options_of, told_by, values_of
from ..formats import FORMATS, KV_FORMATS, Form, KvForm, Options, chosen, chosen_kv

SILENCE = 600.0  # seconds after which a rank that says nothing counts as gone


def _undigested(default: Any, help: str, **more: Any) -> Any:
    """An option that changes no byte, or shows in the names, dtypes and shapes of tensors, which are in the fingerprint."""
    return option(default, help, digested=False, **more)


@dataclass(frozen=True)
class Request:
    """Everything that decides what an export writes and how, but for the model, the statistics and the folder.

    `format` and `kv_cache` are None until `plain` or the model's quantizers settle them.

    smoothed      the weights have the factors of their AWQ format already
    inherited     ModelOpt's quantizers settled the request, and the statistics are theirs
    bucket_bytes  bytes of encoded tensors that are made at a time; None for the usual number
    """

    format: str | None = _undigested(
        None,
        "format of the linears' weights and activations (default: that of ModelOpt's quantizers in a Megatron checkpoint, "
        "else fp8)",
        choices=tuple(FORMATS),
    )
    kv_cache: str | None = _undigested(
        None,
        "format of the KV cache (default: that of ModelOpt's quantizers in a Megatron checkpoint, else none)",
        choices=tuple(KV_FORMATS),
    )
    kv_scale: float | None = option(
        None,
        "scale of all keys and values in the cache, in place of measured ones; 1 is not written for an fp8 cache, since engines "
        "take it where there is none (ModelOpt: fp8_cast)",
    )
    kv_scale_at_least: float | None = option(
        None, "raise the scales of an fp8 cache to this number, as ModelOpt's Megatron export does with 1"
    )
    input_scale: float | None = option(
        None, "`input_scale` of all linears, in formats that have it, in place of measured ones"
    )
    options: Options = Options()  # noqa: RUF009 - frozen
    overwrite: bool = _undigested(
        False, "replace a folder that is not empty, in the moment the new one is complete", planned=False
    )
    writers: str = _undigested(
        "rank0",
        "which ranks write files: rank 0, the first of every node, or all; the bytes are the same",
        choices=("rank0", "node", "all"),
    )
    sync: bool = _undigested(
        True,
        "publish before everything is on the disk: faster, and lost if the machine fails within a minute",
        flag="no_fsync",
        planned=False,
    )
    resume: bool = _undigested(
        False, "go on with an interrupted export into the same folder; if there is none, start", planned=False
    )
    timeout: float = _undigested(
        SILENCE, "seconds after which a rank that is not heard of counts as gone", planned=False
    )
    max_shard_size: str | int = _undigested("5GB", "largest safetensors file")
    exclude: tuple[str, ...] = _undigested((), "globs over HF module names to leave in bfloat16")
    mtp: str = _undigested(
        "keep",
        "layers that predict one more token (DeepSeek): export them like the others, or leave them out",
        choices=("keep", "drop"),
    )
    quantize_mla: bool = _undigested(
        False, "quantize latent attention (DeepSeek) too, in formats that not every engine loads it in"
    )
    target: str = _undigested(
        "",
        "engines that must load the result, such as vllm,sglang,tensorrt_llm, or vllm:8 for eight GPUs that share each layer: if "
        "one would refuse it, nothing is written",
    )
    merge_lora: bool = _undigested(
        False, "merge LoRA adapters that the Megatron checkpoint has into the weights", planned=False
    )
    smoothed: bool = False
    inherited: bool = False
    bucket_bytes: int | None = None

    def plain(self) -> "Request":
        """The request for a model without quantizers of ModelOpt."""
        return replace(self, format=self.format or "fp8", kv_cache=self.kv_cache or "none")

    def form(self) -> Form:
        """The format that is asked for; `ExportError` for an unknown one, and for an option without effect."""
        form = chosen(self.format, self.options)
        if self.smoothed:
            form = replace(form, smoothing=replace(form.smoothing, done=True))
        if self.input_scale is None:
            return form
        if "input_scale" not in form.stored:
            raise ExportError(f"--input-scale has no effect with --format {form.name}, which writes no input_scale")
        return replace(form, input_scale=_scale("--input-scale", self.input_scale))

    def kv(self) -> KvForm | None:
        """The format of the cache, None for none; `ExportError` as of `form`."""
        cache = chosen_kv(self.kv_cache)
        for flag, value in (("--kv-scale", self.kv_scale), ("--kv-scale-at-least", self.kv_scale_at_least)):
            if value is not None and cache is None:
                raise ExportError(f"{flag} has no effect without --kv-cache")
        if self.kv_scale is not None:
            if self.kv_scale_at_least is not None:
                raise ExportError("--kv-scale-at-least has no effect with --kv-scale, which is the scale of all")
            return chosen_kv(self.kv_cache, scale=_scale("--kv-scale", self.kv_scale))
        if self.kv_scale_at_least is None:
            return cache
        if cache.implied is None:
            raise ExportError(
                f"--kv-scale-at-least is for --kv-cache fp8: blocks of {cache.name} have scales of their own below it"
            )
        return chosen_kv(self.kv_cache, least=_scale("--kv-scale-at-least", self.kv_scale_at_least))

    def digested(self) -> dict[str, Any]:
        """Option -> value, of the options in the fingerprint of settings."""
        known = options_of(type(self))
        return {name: value for name, value in values_of(self).items() if told_by(known[name]).digested}

    def said(self) -> dict[str, Any]:
        """Option -> value, of the options that differ from their defaults, for the manifest."""
        known = options_of(type(self))
        return {name: value for name, value in values_of(self).items() if value != known[name].default}


def _scale(flag: str, value: float) -> float:
    """A scale, if float32 has it."""
    if not torch.finfo(torch.float32).tiny <= value <= torch.finfo(torch.float32).max:  # NaN is neither
        raise ExportError(f"{flag} must be a number above 0 that float32 holds, not {value:g}")
    return value


def requested(options: dict[str, Any], without: Collection[str] = (), **more: Any) -> Request:
    """The request that the keywords of a library function make; `TypeError` for unknown ones and those in `without`."""
    checked(Request, options, without)
    given = options | ({"exclude": tuple(options["exclude"])} if "exclude" in options else {})
    return replace(made(Request, given), **more)
