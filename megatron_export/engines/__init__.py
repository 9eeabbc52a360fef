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

__all__ = ["ENGINES", "GPUS", "Checkpoint", "Effect", "Finding", "Header", "Rule", "Verdict", "judged"]

ENGINES: dict[str, ModuleType] = {"vllm": vllm, "sglang": sglang, "tensorrt_llm": tensorrt_llm}


def judged(checkpoint: Checkpoint, engine: str, version: str | None = None, gpu: str | None = None) -> Verdict:
    """What the engine of that name in `ENGINES` makes of a checkpoint, on a GPU of `GPUS` where one is given."""
    module = ENGINES[engine]
    findings = module.judge(checkpoint, version or module.VERSION, gpu)
    return Verdict(module.NAME, version or module.VERSION, findings.all())
