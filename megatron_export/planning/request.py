"""What is asked of an export. A field makes the command's flag, the library's keyword, and entries in fingerprint and manifest."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from ..common.dtypes import NORMAL
from ..common.errors import ExportError
from ..common.options import checked, made, option, options_of, told_by, values_of
from ..common.safe_files import shown
from ..formats import FORMATS, KV_FORMATS, PLAIN, Form, KvForm, Options, chosen_all, chosen_kv
from ..models.registry import DRAFTS
from .recipe import Line, Recipe, recipe_of, set_line, uniform

RECIPE_OPTIONS = (*options_of(Options), "kv_cache", "kv_scale", "kv_scale_at_least", "input_scale", "quantize_mla")
DRAFT_FORMATS = tuple(dict.fromkeys(name for draft in DRAFTS.values() for name in draft.formats))
LAYOUTS = ("draft", "combined")
# Options that a model and its draft share.
_OF_ALL = ("overwrite", "writers", "sync", "sha256", "resume", "timeout", "max_shard_size")
SILENCE = 600.0  # seconds after which a rank that says nothing counts as gone


def _undigested(default: Any, help: str, **more: Any) -> Any:
    """An option that changes no byte, or shows in the names, dtypes and shapes of tensors, which are in the fingerprint."""
    return option(default, help, digested=False, **more)


@dataclass(frozen=True)
class Request:
    """Everything that decides what an export writes and how, but for the model, the statistics and the folder.

    `format` and `kv_cache` are None, and there is no line of a recipe, until `plain` or the model's quantizers settle them.

    recipe_lines  which format each module gets, settled: those of `format` or `recipe`, of `set`, of `exclude`
    smoothed      the weights have the factors of their AWQ format already
    inherited     ModelOpt's quantizers settled the request, and the statistics are theirs
    usual         the format of a model without quantizers, if none is asked for
    bucket_bytes  bytes of encoded tensors that are made at a time; None for the usual number
    """

    format: str | None = _undigested(
        None,
        "format of the linears' weights and activations (default: that of ModelOpt's quantizers in a Megatron checkpoint, "
        "else fp8)",
        choices=tuple(FORMATS),
    )
    recipe: str | None = _undigested(
        None, "a format for each module: the name of a recipe in docs/recipes.md, or a file FILE.yaml"
    )
    set: tuple[str, ...] = _undigested(
        (),
        "GLOB=FORMAT: a line of the recipe for HF modules, added to those of --format or --recipe; the last that matches counts",
    )
    effective_bits: float | None = _undigested(
        None,
        "bits that an element of a linear may take, with its scales: choose a format of --from for each group of linears that "
        "engines fuse, by the loss that calibration measures, and write the choice as recipe.yaml into the checkpoint",
    )
    candidates: str = _undigested("nvfp4,fp8,bf16", "formats that --effective-bits chooses from", flag="from")
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
    sha256: bool = _undigested(
        False, "list the sha256 of every file in export_manifest.json, beside its crc32", planned=False
    )
    resume: bool = _undigested(
        False, "go on with an interrupted export into the same folder; if there is none, start", planned=False
    )
    timeout: float = _undigested(
        SILENCE, "seconds after which a rank that is not heard of counts as gone", planned=False
    )
    max_shard_size: str | int = _undigested("5GB", "largest safetensors file")
    exclude: tuple[str, ...] = _undigested(
        (), "globs over HF module names to leave in bfloat16, as --set GLOB=bf16 does"
    )
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
    draft_output: str = _undigested(
        "",
        "folder for the draft (EAGLE-3) that the model has beside itself, or none to leave it out (default: OUTPUT-draft)",
        planned=False,
    )
    draft_format: str | None = _undigested(
        None,
        "format of the draft's linears (default: that of ModelOpt's quantizers in it, else bf16)",
        choices=DRAFT_FORMATS,
        planned=False,
    )
    medusa_layout: str | None = _undigested(
        None,
        "where Medusa's heads go: a draft in a folder of its own, in bf16, for vLLM; or combined with the model in one, for "
        "TensorRT-LLM (default: draft)",
        choices=LAYOUTS,
        planned=False,
    )
    recipe_lines: tuple[Line, ...] = ()
    smoothed: bool = False
    inherited: bool = False
    usual: str = "fp8"
    bucket_bytes: int | None = None

    def plain(self) -> "Request":
        """The request for a model without quantizers of ModelOpt; `ExportError` for a recipe that cannot be read."""
        if self.effective_bits is not None:
            given = [name for name in ("format", "recipe") if getattr(self, name)]
            if given:
                raise ExportError(f"--{given[0]} has no effect with --effective-bits, which chooses the formats")
            name = next((name for name in self.candidates_in() if name != PLAIN), PLAIN)
            return replace(self, kv_cache=self.kv_cache or "none").settled(uniform(name))
        if self.candidates != type(self).candidates:
            raise ExportError("--from has no effect without --effective-bits")
        if self.recipe and self.format:
            raise ExportError(f"--format has no effect with --recipe. Add a line to it with --set '*={self.format}'")
        recipe = recipe_of(self.recipe) if self.recipe else uniform(self.format or self.usual)
        found = _with_defaults(self, recipe)
        return replace(found, kv_cache=found.kv_cache or "none").settled(recipe)

    def candidates_in(self) -> list[str]:
        """The formats that a budget chooses from; `ExportError` for unknown ones, for those of AWQ, and for bits that are none."""
        names = list(dict.fromkeys(name.strip() for name in self.candidates.split(",")))
        for name, form in chosen_all(names, Options()).items():
            if form.smoothing:
                raise ExportError(
                    f"--from {name}: AWQ prepares its weights, so it cannot be chosen by linear. Leave it out"
                )
        if not 0 < self.effective_bits < inf:  # NaN is neither
            raise ExportError(f"--effective-bits must be a number above 0, not {self.effective_bits:g}")
        return names

    def settled(self, recipe: Recipe) -> "Request":
        """The request with the lines of a recipe, and those of its own."""
        own = [set_line(text) for text in self.set]
        own += [Line(glob, PLAIN, f"--exclude {glob!r}") for glob in self.exclude]
        return replace(self, format=recipe.name, recipe_lines=(*recipe.lines, *own))

    def forms(self) -> dict[str, Form]:
        """The formats of a settled request by name; `ExportError` for an option without effect on them or on a budget's."""
        used = dict.fromkeys(line.format for line in self.recipe_lines)
        candidates = self.candidates_in() if self.effective_bits is not None else ()
        forms = chosen_all(used | dict.fromkeys(candidates), self.options)
        if self.smoothed:
            done = {n: replace(form.smoothing, done=True) for n, form in forms.items() if form.smoothing}
            forms = {name: replace(form, smoothing=done.get(name)) for name, form in forms.items()}
        if self.input_scale is None:
            return {name: forms[name] for name in used}
        scaled = {name: form for name, form in forms.items() if "input_scale" in form.stored}
        if not scaled:
            raise ExportError(f"--input-scale has no effect with --format {self.format}, which writes no input_scale")
        given = _scale("--input-scale", self.input_scale)
        forms |= {name: replace(form, input_scale=given) for name, form in scaled.items()}
        return {name: forms[name] for name in used}

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

    def of_draft(self) -> "Request":
        """The request for the draft that the model has beside itself; `ExportError` for a format that drafts are not written in."""
        if self.draft_format not in (None, *DRAFT_FORMATS):
            known = ", ".join(DRAFT_FORMATS)
            raise ExportError(
                f"--draft-format {shown(self.draft_format)}: a draft has none of this kind. Known: {known}"
            )
        own = {name: getattr(self, name) for name in _OF_ALL}
        scale = self.input_scale if self.draft_format not in (None, PLAIN) else None
        return Request(format=self.draft_format, input_scale=scale, usual=PLAIN, **own)

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
    if not isinstance(value, (int, float)) or not NORMAL[0] <= value <= NORMAL[1]:  # NaN is neither
        raise ExportError(f"{flag} must be a number above 0 that float32 holds, not {shown(value)}")
    return value


def _with_defaults(request: Request, recipe: Recipe) -> Request:
    """The request with a recipe's options where it has none of its own; `ExportError` for unknown ones and wrong values."""
    known, own = options_of(Request), values_of(request)
    said = f"recipe {recipe.name}: option"
    for name, value in recipe.options.items():
        if name not in RECIPE_OPTIONS or name not in known:
            raise ExportError(f"{said} {shown(name)} is not known. Known: {', '.join(RECIPE_OPTIONS)}")
        choices = told_by(known[name]).choices
        if choices and value not in choices:
            raise ExportError(f"{said} {name} must be one of {', '.join(map(str, choices))}, not {shown(value)}")
    wanted = {name: value for name, value in recipe.options.items() if own[name] == known[name].default}
    inner = {name: value for name, value in wanted.items() if name in options_of(Options)}
    outer = {name: value for name, value in wanted.items() if name not in inner}
    return replace(request, options=replace(request.options, **inner), **outer)


def requested(options: dict[str, Any], without: Collection[str] = (), **more: Any) -> Request:
    """The request that the keywords of a library function make; `TypeError` for unknown ones and those in `without`."""
    checked(Request, options, without)
    return replace(made(Request, options), **more)
