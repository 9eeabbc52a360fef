"""What is asked of an export. A field is the command's flag and the library's keyword, in the fingerprint and in the manifest."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from ..common.options import checked, made, option, options_of, told_by, values_of
from ..formats import FORMATS, KV_FORMATS, Form, Options, chosen

SILENCE = 600.0  # seconds after which a rank that says nothing counts as gone


@dataclass(frozen=True)
class Request:
    """Everything that decides what an export writes and how, but for the model, the statistics and the folder.

    `format` and `kv_cache` are None until `plain` or the model's quantizers settle them.

    smoothed   the weights have the factors of their AWQ format already
    inherited  ModelOpt's quantizers settled it, and the statistics are theirs
    bucket_bytes  of encoded tensors that are made at a time; None: as many as an export makes
    Options that the plan shows are not digested on their own: names, dtypes and shapes of all tensors are in the fingerprint.
    """

    format: str | None = option(
        None,
        "format of the linears' weights and activations (default: that of ModelOpt's quantizers in a Megatron checkpoint, "
        "else fp8)",
        choices=tuple(FORMATS),
        digested=False,
    )
    kv_cache: str | None = option(
        None,
        "format of the KV cache (default: that of ModelOpt's quantizers in a Megatron checkpoint, else none)",
        choices=tuple(KV_FORMATS),
        digested=False,
    )
    options: Options = Options()  # noqa: RUF009 - frozen
    overwrite: bool = option(
        False,
        "replace a folder that is not empty, in the moment the new one is complete",
        planned=False,
        digested=False,
    )
    writers: str = option(
        "rank0",
        "which ranks write files: rank 0, the first of every node, or all; the bytes are the same",
        choices=("rank0", "node", "all"),
        digested=False,
    )
    sync: bool = option(
        True,
        "publish before everything is on the disk: faster, and lost if the machine fails within a minute",
        flag="no_fsync",
        planned=False,
        digested=False,
    )
    resume: bool = option(
        False,
        "go on with an interrupted export into the same folder; if there is none, start",
        planned=False,
        digested=False,
    )
    timeout: float = option(
        SILENCE, "seconds after which a rank that is not heard of counts as gone", planned=False, digested=False
    )
    max_shard_size: str | int = option("5GB", "largest safetensors file", digested=False)
    exclude: tuple[str, ...] = option((), "globs over HF module names to leave in bfloat16", digested=False)
    mtp: str = option(
        "keep",
        "layers that predict one more token (DeepSeek): export them like the others, or leave them out",
        choices=("keep", "drop"),
        digested=False,
    )
    quantize_mla: bool = option(
        False,
        "quantize latent attention (DeepSeek) too, in formats that not every engine loads it in",
        digested=False,
    )
    target: str = option(
        "",
        "engines that must load the result, such as vllm,sglang,tensorrt_llm, or vllm:8 for eight GPUs that share each layer: if "
        "one would refuse it, nothing is written",
        digested=False,
    )
    merge_lora: bool = option(
        False,
        "merge LoRA adapters that the Megatron checkpoint has into the weights",
        planned=False,
        digested=False,
    )
    smoothed: bool = False
    inherited: bool = False
    bucket_bytes: int | None = None

    def plain(self) -> "Request":
        """The request for a model without quantizers of ModelOpt."""
        return replace(self, format=self.format or "fp8", kv_cache=self.kv_cache or "none")

    def form(self) -> Form:
        """The format that is asked for; `ExportError` for an unknown one, or an option without effect."""
        form = chosen(self.format, self.options)
        return replace(form, smoothing=replace(form.smoothing, done=True)) if self.smoothed else form

    def digested(self) -> dict[str, Any]:
        """What the fingerprint of settings has, by option."""
        known = options_of(type(self))
        return {name: value for name, value in values_of(self).items() if told_by(known[name]).digested}

    def said(self) -> dict[str, Any]:
        """What the manifest says: the options that differ from their defaults."""
        known = options_of(type(self))
        return {name: value for name, value in values_of(self).items() if value != known[name].default}


def requested(options: dict[str, Any], without: Collection[str] = (), **more: Any) -> Request:
    """The request that keywords of a library function make; `TypeError` for unknown ones and those in `without`."""
    checked(Request, options, without)
    given = options | ({"exclude": tuple(options["exclude"])} if "exclude" in options else {})
    return replace(made(Request, given), **more)
