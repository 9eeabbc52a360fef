"""Drafts in a real vLLM and in SGLang's own loaders, on a CPU: they fill what the rules say, and refuse or leave empty the rest.
CONTRIBUTING.md has their setup.
"""

from pathlib import Path

import pytest

from megatron_export.engines import DRAFTS, Effect

from ..support.checkpoints import described, written
from ..support.draft_headers import said_of_base
from .asking import judged, tried
from .test_drafts import BASE, CASES, of_case

WORST = (Effect.REFUSES, Effect.UNKNOWN)
# Which an engine takes from the base later, or makes and does not use.
EMPTY = {
    "vllm": {"model.layers.1.hidden_norm.weight": ("the others' norm lost",)},
    "sglang": {
        "model.embed_tokens.weight": tuple(CASES),
        "lm_head.weight": ("lm_head of the base",),
        "model.layers.1.input_layernorm.weight": ("vLLM's norm lost",),
    },
}
# Refused drafts that an engine loads without an error, to misread them, or to fail when it computes.
UNNOTICED = {
    "vllm": (
        *("stored in integers", "a tensor twice", "d2t in bfloat16", "lm_head lost", "a layer listed twice"),
        *("a layer outside", "Medusa, a block in codes", "Medusa, an output layer in codes"),
    ),
    "sglang": (
        *("fc in FP8", "everything left out", "something left out", "no config", "mixed", "stored in integers"),
        *("a tensor twice", "d2t lost", "d2t in bfloat16", "d2t of all tokens"),
        *("a layer listed twice", "a layer outside", "the last layer"),
    ),
}


def seen(engine: str, loading: str, folder: Path, flags: tuple[str, ...] = ()) -> dict[str, str]:
    """Cases in which an engine did not do what the rules say: the rules that were broken, and what it said."""
    cases = [case for case, (_, _, beside, asked, *_) in CASES.items() if not asked and beside in (BASE, None)]
    folders = {written(of_case(case), folder / str(number)): case for number, case in enumerate(cases)}
    found = {}
    for path, one in tried(loading, *folders, flags=flags).items():
        case = folders[path]
        verdict = judged(described(of_case(case)), engine, base=BASE if CASES[case][2] else None)
        broken = {one.rule for one in verdict.findings if DRAFTS[engine].RULES[one.rule].effect in WORST}
        loaded = one["error"] is None and all(case in EMPTY[engine].get(name, ()) for name in one["lacking"])
        unnoticed = case in UNNOTICED[engine] and "gone" not in broken
        if loaded == (bool(broken) and not unnoticed):
            found[case] = f"{', '.join(broken) or 'nothing'} | {one['error']} | {one['lacking']}"
    return found


@pytest.mark.vllm
def test_vllm_loads_of_drafts_what_the_rules_say(tmp_path: Path) -> None:
    base = written(said_of_base(), tmp_path / "base")
    assert seen("vllm", "vllm_draft_loading", tmp_path, (str(base),)) == {}


@pytest.mark.sglang
def test_sglang_loads_of_drafts_what_the_rules_say(tmp_path: Path) -> None:
    assert seen("sglang", "sglang_loading", tmp_path) == {}
