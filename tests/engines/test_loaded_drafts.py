"""Drafts in a real vLLM and in SGLang's own loaders, on a CPU: they fill what the rules say, and refuse or leave empty the rest.
CONTRIBUTING.md has their setup.
"""

from pathlib import Path

import pytest

from megatron_export.engines import DRAFTS, Effect, verdict_of

from ..support.checkpoints import described, written
from ..support.draft_headers import said_of_base
from .asking import tried
from .test_drafts import BASE, CASES, of_case

OF_BASE = ["model.embed_tokens.weight"]  # which SGLang takes from the base later
WORST = (Effect.REFUSES, Effect.UNKNOWN)
# What cannot be seen in what was loaded: rules about what is computed later, about a base, and about values that are converted.
UNSEEN = {
    "vllm": set(),
    "sglang": set(),
}


def seen(engine: str, loading: str, folder: Path, flags: tuple[str, ...] = ()) -> dict[str, str]:
    """Cases in which an engine did not do what the rules say: the rules that were broken, and what it said."""
    cases = [case for case, (_, _, beside, asked, *_) in CASES.items() if not asked and beside in (BASE, None)]
    folders = {written(of_case(case), folder / str(number)): case for number, case in enumerate(cases)}
    found = {}
    for path, one in tried(loading, *folders, flags=flags).items():
        case = folders[path]
        verdict = verdict_of(described(of_case(case)), engine, base=BASE if CASES[case][2] else None)
        broken = {one.rule for one in verdict.findings if DRAFTS[engine].RULES[one.rule].effect in WORST}
        loaded = one["error"] is None and one["lacking"] in ([], OF_BASE)
        if loaded == bool(broken - UNSEEN[engine]):
            found[case] = f"{', '.join(broken) or 'nothing'} | {one['error']} | {one['lacking']}"
    return found


@pytest.mark.vllm
def test_vllm_loads_of_drafts_what_the_rules_say(tmp_path: Path) -> None:
    base = written(said_of_base(), tmp_path / "base")
    assert seen("vllm", "vllm_draft_loading", tmp_path, (str(base),)) == {}


@pytest.mark.sglang
def test_sglang_loads_of_drafts_what_the_rules_say(tmp_path: Path) -> None:
    assert seen("sglang", "sglang_loading", tmp_path) == {}
