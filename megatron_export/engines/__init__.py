"""What vLLM, SGLang and TensorRT-LLM accept: one file each, over names, dtypes, shapes and configs alone.

Each is a module with

NAME      as people call it
VERSION   the release whose sources its rules were read in
RULES     name -> rule, with its source beside it
judge     checkpoint, version, GPU -> what it finds
"""

from types import ModuleType

from . import sglang, tensorrt_llm, vllm
from .checkpoint import Checkpoint, Header
from .gpus import GPUS
from .verdict import Effect, Finding, Rule, Verdict

__all__ = ["ENGINES", "GPUS", "Checkpoint", "Effect", "Finding", "Header", "Rule", "Verdict", "engines_in", "judged"]

ENGINES: dict[str, ModuleType] = {"vllm": vllm, "sglang": sglang, "tensorrt_llm": tensorrt_llm}


def judged(checkpoint: Checkpoint, engine: str, version: str | None = None, gpu: str | None = None) -> Verdict:
    """What the engine of that name in `ENGINES` makes of a checkpoint, on a GPU of `GPUS` where one is given."""
    module = ENGINES[engine]
    asked = version or module.VERSION
    found = module.judge(checkpoint, asked, gpu).all()
    if not f"{module.VERSION}.".startswith(f"{asked}."):
        found += (Finding("version", Effect.MINDS, f"these are the rules of {module.VERSION}", "", ()),)
    return Verdict(module.NAME, asked, found)


def engines_in(text: str) -> tuple[str, ...]:
    """The engines of a list such as 'vllm,sglang'; `ValueError` with the known ones."""
    names = tuple(name.strip().replace("-", "_") for name in text.split(",") if name.strip())
    if odd := [name for name in names if name not in ENGINES]:
        raise ValueError(f"unknown engine {odd[0]!r}. Known: {', '.join(ENGINES)}")
    return names
