"""Which engines load the result of a plan: what was read in the loaders of vLLM 0.32, SGLang 0.5.23 and TensorRT-LLM's main
branch of 2026, and for vLLM tried.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .names import is_expert, is_latent, makes_keys
from .plan import Plan

ENGINES = ("vLLM", "SGLang", "TensorRT-LLM")


@dataclass(frozen=True)
class Verdict:
    """Whether an engine loads a checkpoint, None where nobody knows; and why not, or what to mind."""

    loads: bool | None
    why: str = ""

    @property
    def text(self) -> str:
        """Both in a few words."""
        word = {True: "loads", False: "no", None: "not known"}[self.loads]
        return f"{word}: {self.why}" if self.why else word


YES, BLACKWELL = Verdict(True), Verdict(True, "on Blackwell")
_UNKNOWN = Verdict(False, "does not know this format")

# fmt: off
BY_FORMAT: dict[str, tuple[Verdict, Verdict, Verdict]] = {  # in the order of ENGINES
    "bf16":               (YES, YES, YES),
    "fp8":                (YES, YES, YES),
    "fp8_pb":             (YES, YES, YES),
    "fp8_pb modelopt":    (YES, Verdict(False, "refuses FP8_PB_WO"), YES),
    "nvfp4":              (YES, YES, BLACKWELL),
    "nvfp4_awq":          (YES, YES, BLACKWELL),
    "nvfp4_awq modelopt": (_UNKNOWN, Verdict(False, "does not apply all pre_quant_scale"), BLACKWELL),
    "int4_awq":           (_UNKNOWN, _UNKNOWN, YES),
    "w4a8_awq":           (_UNKNOWN, _UNKNOWN, Verdict(True, "on Ada and Hopper")),
}
# fmt: on


def verdicts(plan: Plan) -> dict[str, Verdict]:
    """Engine -> its verdict. One that refuses for any reason refuses; of what to mind, all is told."""
    found = dict(zip(ENGINES, BY_FORMAT[_spelling(plan)], strict=True))
    for engine, verdict in _exceptions(plan):
        known = found[engine]
        if known.loads is False or (verdict.loads and not known.loads):
            continue
        both = known.loads and verdict.loads and known.why
        found[engine] = Verdict(True, f"{known.why}; {verdict.why}") if both else verdict
    return found


def _spelling(plan: Plan) -> str:
    form = plan.form
    modelopt = {"fp8_pb": form.native is None, "nvfp4_awq": bool(form.smoothing and form.smoothing.keeps)}
    return f"{form.name} modelopt" if modelopt.get(form.name) else form.name


def _exceptions(plan: Plan) -> Iterator[tuple[str, Verdict]]:
    """Where an architecture, its sizes or a KV cache make a difference."""
    architecture, form = plan.config["architectures"][0], plan.form
    latent = any(item.form and is_latent(item.source.canonical) for item in plan.items)
    if latent and form.name != "fp8_pb":
        yield "TensorRT-LLM", Verdict(False, f"does not load all of latent attention in {form.name}")
        if form.name != "fp8":
            yield "SGLang", Verdict(False, f"does not load all of latent attention in {form.name}")
    if architecture.startswith("Llama4") and form.quantization:
        yield from _of_llama4(plan)
    if architecture == "GptOssForCausalLM" and form.quantization:
        yield from ((engine, Verdict(None, "not tried with this architecture")) for engine in ENGINES)
    if form.name == "fp8_pb" and (parts := _partial_blocks(plan)):
        yield "vLLM", Verdict(False, f"wants q, k, gate and experts in whole blocks of 128, unlike {parts[0]}")
    if plan.kv:
        yield from _of_cache(plan, architecture)


def _of_llama4(plan: Plan) -> Iterator[tuple[str, Verdict]]:
    stacks = [item.stacked for item in plan.items if item.source.stack]
    if stacks and not any(stacks):
        yield "TensorRT-LLM", Verdict(False, "reads experts of Llama 4 only where they are stacked in one tensor")
    if any(stacks) and plan.form.name != "fp8":
        yield "SGLang", Verdict(False, f"does not load stacked experts in {plan.form.name}")


def _partial_blocks(plan: Plan) -> list[str]:
    """HF weights that engines fuse with what follows, or cut, and whose rows are no whole blocks."""
    found = []
    for item in plan.items:
        source = item.source
        fused = makes_keys(source.canonical) or source.canonical.endswith("linear_fc1.weight")
        if item.form and fused:
            parts = item.parts if is_expert(source.canonical) else item.parts[:-1]
            found += [part.name for part in parts if part.shape[0] % 128]
    return found


def _of_cache(plan: Plan, architecture: str) -> Iterator[tuple[str, Verdict]]:
    if plan.kv.NAME == "nvfp4":
        yield "vLLM", Verdict(True, "its NVFP4 KV cache with FlashInfer only")
        yield "SGLang", Verdict(True, "with --kv-cache-dtype nvfp4 on Blackwell")
    elif plan.form.name != "fp8":
        yield "SGLang", Verdict(True, "its FP8 KV cache with --kv-cache-dtype fp8_e4m3")
        if plan.form.native:
            yield "vLLM", Verdict(True, "its FP8 KV cache with --kv-cache-dtype fp8")
    if architecture == "MixtralForCausalLM":
        yield "SGLang", Verdict(False, "does not load the scales of Mixtral's KV cache")
    if architecture in ("Qwen2ForCausalLM", "Qwen3MoeForCausalLM") or architecture.startswith("Llama4"):
        yield "SGLang", Verdict(True, "ignores the scales of this architecture's KV cache")
