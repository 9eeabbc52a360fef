"""What vLLM, SGLang and TensorRT-LLM accept: one file each, over names, dtypes, shapes and configs alone.

Each is a module with

NAME      as people call it
VERSION   the release whose rules they are
SOURCES   the sources that they were read in
RELEASES  that one, and others that were read for what differs
SEEN_IN   the tests that show rules marked as seen in a real engine; '' for none
RULES     name -> rule, with its source beside it
judge     checkpoint, version, GPU, tensor-parallel size -> what it finds

and another for drafts, with SEEN_IN, RULES and a `judge` of its own, which also takes the kind of draft and the base's checkpoint.
"""

from types import ModuleType

from . import sglang, sglang_drafts, tensorrt_llm, tensorrt_llm_drafts, vllm, vllm_drafts
from .checkpoint_view import CheckpointView, Header
from .checks import release_of
from .drafts import kind_of
from .gpus import GPUS
from .verdict import Effect, Finding, Rule, Verdict

ENGINES: dict[str, ModuleType] = {"vllm": vllm, "sglang": sglang, "tensorrt_llm": tensorrt_llm}
DRAFTS: dict[str, ModuleType] = {"vllm": vllm_drafts, "sglang": sglang_drafts, "tensorrt_llm": tensorrt_llm_drafts}


def verdict_of(
    checkpoint: CheckpointView,
    engine: str,
    version: str | None = None,
    gpu: str | None = None,
    tp: int = 1,
    base: CheckpointView | None = None,
) -> Verdict:
    """What an engine, by its name in `ENGINES`, makes of a checkpoint on `tp` GPUs of a kind in `GPUS` that share each layer; of a
    draft, also beside its `base`. Raises `ValueError` for a version without a number.
    """
    module = ENGINES[engine]
    asked = version or module.VERSION
    if not release_of(asked):
        raise ValueError(f"{asked!r} is no release: it has no number")
    known = next((one for one in module.RELEASES if f"{one}.".startswith(f"{asked}.")), None)
    rules = known or _nearest(module.RELEASES, asked)
    if kind := kind_of(checkpoint):
        found = DRAFTS[engine].judge(checkpoint, kind, base, known or asked, gpu, tp).all()
    else:
        found = module.judge(checkpoint, known or asked, gpu, tp).all()
    if unknown := tuple(one for one in found if one.effect is Effect.UNKNOWN):
        return Verdict(module.NAME, asked, unknown)  # what other rules find was looked for in something else
    if known is None:
        found += (Finding("version", Effect.MINDS, f"these are the rules of {rules}", "", ()),)
    return Verdict(module.NAME, asked, found)


def _nearest(releases: tuple[str, ...], asked: str) -> str:
    """The newest of some releases that is not later than one that is none of them, or else the oldest."""
    in_order = sorted(releases, key=release_of)
    earlier = [one for one in in_order if release_of(one) <= release_of(asked)]
    return (earlier or in_order)[-1 if earlier else 0]


def targets_in(text: str) -> dict[str, int]:
    """Engine -> tensor-parallel size, of a list such as 'vllm:8,sglang'; `ValueError` for an unknown engine or a wrong size."""
    found = {}
    for target in filter(None, (one.strip() for one in text.split(","))):
        spelled, given, size = target.partition(":")
        name = spelled.strip().replace("-", "_")
        if name not in ENGINES:
            raise ValueError(f"unknown engine {name!r}. Known: {', '.join(ENGINES)}")
        if given and not (size.isascii() and size.isdigit() and int(size)):
            raise ValueError(f"{target!r}: {size!r} is no tensor-parallel size. Write {name}:8 for eight GPUs")
        found[name] = int(size or 1)
    return found
