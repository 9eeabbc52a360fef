"""The model card, README.md, in the Hub's format: front matter that the Hub reads, then what people ask first."""

import json
import re

from ... import __version__
from .facts import Account

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FLAG = re.compile(r"--[\w-]+ [\w.]+")
_SERVERS = {
    "vLLM": "vllm serve {name}",
    "SGLang": "python -m sglang.launch_server --model-path {name}",
    "TensorRT-LLM": "trtllm-serve {name}",
}
_BITS = {"fp8": "8-bit", "fp8_pb": "8-bit"}


def text(run: Account) -> str:
    """The whole card."""
    return "\n".join([*_front(run), "", *_head(run), *_quality(run), *_serving(run), *_origin(run)]) + "\n"


def commands(run: Account) -> dict[str, str]:
    """Engine -> how it is started with this checkpoint, for the engines that load it."""
    loading = {engine: said for engine, said in run.engines.items() if said.startswith("loads")}
    return {
        engine: " ".join([_SERVERS[engine].format(name=run.name), *_FLAG.findall(said)])
        for engine, said in loading.items()
        if engine in _SERVERS
    }


def _front(run: Account) -> list[str]:
    form = run.plan.form
    base = run.origin if _HUB_ID.fullmatch(run.origin) else None
    tags = ["megatron-core", "modelopt", "quantized", _BITS.get(form.name, "4-bit"), form.name]
    tags = ["megatron-core", "safetensors"] if not form.quantization else tags
    library = "transformers" if form.native or not form.quantization else "Model Optimizer"  # what reads the layout
    return [
        "---",
        *([f"base_model: {base}", "base_model_relation: quantized"] if base else []),
        *([f"license: {run.license}"] if run.license else []),
        f"library_name: {library}",
        f"pipeline_tag: {'image-text-to-text' if run.plan.copied else 'text-generation'}",
        "tags:",
        *(f"- {tag}" for tag in [*tags, *(["kv-cache-" + run.plan.kv.NAME] if run.plan.kv else [])]),
        "---",
    ]


def _head(run: Account) -> list[str]:
    plan = run.plan
    cache = f", and an {plan.kv.NAME.upper()} KV cache" if plan.kv else ""
    return [
        f"# {run.name}",
        "",
        f"`{run.origin}` in {plan.form.name}{cache}: {len(plan.quantized):,} modules quantized, {run.bits:.2f} bits per quantized "
        f"weight, {run.judged.nbytes:,} bytes, {plan.source_nbytes / plan.nbytes:.2f} times smaller than in bfloat16. Made with "
        f"megatron_export {__version__}.",
        "",
    ]


def _quality(run: Account) -> list[str]:
    lines = ["## Quality", ""]
    weights = [one for one in run.judged.weights if one.format != "bf16"]
    if run.problems:
        lines += [f"- **wrong**: {problem}" for problem in run.problems]
    if weights:
        low = min(weights, key=lambda one: one.snr)
        middle = sorted(one.snr for one in weights)[len(weights) // 2]
        lines.append(
            f"- decoded weights: {middle:.1f} dB signal to noise in the middle, {low.snr:.1f} dB at worst (`{low.name}`)"
        )
    else:
        lines.append("- the weights are those of the original, to the bit")
    if found := run.score:
        lines += [
            f"- perplexity {found.perplexity:.4f} against {found.reference:.4f} of the original: {found.ratio:.4f} times, "
            f"{found.change:+.5f} ± {found.error:.5f} nats per token",
            f"- KL of the next token {found.divergence:.5f} nats",
            f"- on {found.windows} windows of 512 tokens, with the quantized arithmetic emulated in plain torch",
        ]
    return [*lines, ""]


def _serving(run: Account) -> list[str]:
    lines = ["## Serving", ""]
    starting = commands(run)
    for engine, said in run.engines.items():
        lines.append(f"- {engine}: {said}")
    lines.append("")
    for command in starting.values():
        lines += ["```", command, "```"]
    return [*lines, ""] if starting else lines


def _origin(run: Account) -> list[str]:
    said = run.manifest.get("run", {})
    lines = ["## Origin", ""]
    if run.digest:
        lines += [f"- sha256 of `export_manifest.json`, which lists every other file: `{run.digest}`"]
    if calibration := {key: value for key, value in said.get("calibration", {}).items() if value is not None}:
        lines.append(f"- calibration: `{json.dumps(calibration)}`")
    if versions := said.get("versions"):
        lines.append("- " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    return lines
