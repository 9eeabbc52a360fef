"""What differs between releases: engines/releases.py is what `check --version` decides, and what docs/engines.md shows."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from megatron_export import ExportError
from megatron_export.engines import ENGINES, CheckpointView, Effect, verdict_of
from megatron_export.engines.checks import release_of
from megatron_export.engines.releases import CHANGES
from megatron_export.formats import FORMATS, Options

from ..support.checkpoints import described, planned
from ..support.configs import LLAMA, QWEN, QWEN_MOE, SMALL_V3
from .test_drafts import heads
from .test_every_rule import mixed, renamed
from .test_rules import GPT_OSS

PAGE = (Path(__file__).parents[2] / "docs/engines.md").read_text()
SPELLED, KEPT = Options(fp8_pb_spelling="modelopt"), Options(awq_output="modelopt")
RECIPE = "nvfp4_mlp_fp8_attention"


def without_ignore(**settings: object) -> CheckpointView:
    """A model with a layer left out, and config.json alone to say so, under the key that hf_quant_config.json has."""
    said = planned(QWEN_MOE, exclude=("*.layers.1.*",), **settings)
    return replace(renamed(said, "ignore", "exclude_modules"), quant=None)


def in_file_alone() -> CheckpointView:
    said = planned(QWEN, recipe=RECIPE)
    return replace(said, config={key: one for key, one in said.config.items() if key != "quantization_config"})


def of_experts(algorithm: str) -> CheckpointView:
    """A mix whose experts are in blocks, under that name."""
    said = planned(QWEN_MOE, format="nvfp4", set=("*.experts=fp8_pb",))
    return respelled(said, "FP8_BLOCK_SCALES", algorithm)


def respelled(said: CheckpointView, old: str, new: str) -> CheckpointView:
    config, quant = (json.loads(json.dumps(one).replace(f'"{old}"', f'"{new}"')) for one in (said.config, said.quant))
    return replace(said, config=config, quant=quant)


def natively_scaled(said: CheckpointView) -> CheckpointView:
    """With the scales of MXFP8 as SGLang's own format spells them."""
    files = {}
    for file, tensors in said.files.items():
        codes = {name for name, one in tensors.items() if name.endswith("_scale") and one.dtype == "U8"}
        files[file] = {f"{name}_inv" if name in codes else name: one for name, one in tensors.items()}
    return replace(said, files=files, index=None)


# Of each change, a checkpoint that only releases with it load.
# fmt: off
CASES: dict[tuple[str, str], Callable[[], CheckpointView]] = {
    ("vllm", "mixed alone"): in_file_alone,
    ("vllm", "other key"): lambda: without_ignore(format="fp8"),
    ("sglang", "NVFP4_AWQ"): lambda: planned(LLAMA, format="nvfp4_awq", options=KEPT),
    ("sglang", "MXFP8 in a mix"): lambda: natively_scaled(mixed(QWEN_MOE, "*.self_attn.*=mxfp8")),
    ("sglang", "MXFP8"): lambda: planned(QWEN, format="mxfp8"),
    ("sglang", "FP8_PB_WO in a mix"): lambda: respelled(mixed(QWEN_MOE, "*.self_attn.*=fp8_pb"), "FP8_BLOCK_SCALES", "FP8_PB_WO"),
    ("sglang", "W4A16_NVFP4"): lambda: planned(QWEN, format="w4a16_nvfp4"),
    ("sglang", "FP8 in shared experts"): lambda: planned(SMALL_V3, format="fp8"),
    ("sglang", "no swiglu_limit"): lambda: planned(GPT_OSS, format="bf16"),
    ("sglang", "FP8_BLOCK_SCALES in a mix"): lambda: mixed(QWEN_MOE, "*.self_attn.*=fp8_pb"),
    ("sglang", "FP8_PB_WO of experts in a mix"): lambda: of_experts("FP8_PB_WO"),
    ("sglang", "other key of NVFP4"): lambda: without_ignore(format="nvfp4"),
    ("tensorrt_llm", "NVFP4_AWQ"): lambda: planned(LLAMA, format="nvfp4_awq", options=KEPT),
    ("tensorrt_llm", "W4A16_NVFP4"): lambda: planned(LLAMA, format="w4a16_nvfp4"),
    ("tensorrt_llm", "MXFP8"): lambda: planned(LLAMA, format="mxfp8"),
    ("tensorrt_llm", "FP8_PB_WO"): lambda: planned(LLAMA, format="fp8_pb", options=SPELLED),
}
LEAVES = {("vllm", "no Medusa"): lambda: described(heads())}  # and what releases with it do not load any more
# fmt: on


def before(release: str) -> str:
    first, _, last = release.rpartition(".")
    return f"{first}.{int(last) - 1}"


def test_there_is_a_checkpoint_for_each_change() -> None:
    assert (CASES | LEAVES).keys() == {(engine, name) for engine, found in CHANGES.items() for name in found}


@pytest.mark.parametrize(("engine", "name"), CASES | LEAVES)
def test_a_release_decides_by_the_table(engine: str, name: str) -> None:
    said, since = (CASES | LEAVES)[engine, name](), CHANGES[engine][name].since
    decisive = ("awq",)  # on Blackwell it loads
    loads = []
    for release in (before(since), since):
        found = verdict_of(said, engine, release).findings
        loads.append(not [one for one in found if one.effect is Effect.REFUSES and one.rule not in decisive])
    assert loads == ([True, False] if (engine, name) in LEAVES else [False, True])


@pytest.mark.parametrize(
    ("engine", "version", "rules"),
    [
        ("vllm", "0.33rc1", "0.33.0"),
        ("vllm", "0.33", ""),
        ("vllm", "0.33.1", "0.33.0"),
        ("sglang", "0.5.16", "0.5.17"),
        *(("sglang", f"0.5.{patch}", "") for patch in range(17, 24)),
        ("sglang", "0.5.19.post1", "0.5.19"),
        ("sglang", "v0.6", "0.5.23"),
    ],
)
def test_of_a_release_that_nobody_looked_at_the_rules_are_said(engine: str, version: str, rules: str) -> None:
    found = verdict_of(planned(LLAMA, format="fp8"), engine, version).findings
    assert [one.why for one in found] == ([f"these are the rules of {rules}"] if rules else [])


@pytest.mark.parametrize("version", ["main", "nightly.x"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_version_without_a_number_is_refused(engine: str, version: str) -> None:
    with pytest.raises(ValueError, match=f"'{version}' is no release"):
        verdict_of(planned(LLAMA, format="fp8"), engine, version)


FORMS: dict[str, dict] = {  # what is written -> how; into a model without experts and one with
    **{f"`{name}`": {"format": name} for name in FORMATS if name != "bf16"},
    "`fp8_pb`, `--fp8-pb-spelling modelopt`": {"format": "fp8_pb", "options": SPELLED},
    "`nvfp4_awq`, `--awq-output modelopt`": {"format": "nvfp4_awq", "options": KEPT},
    "`nvfp4`, `--kv-cache nvfp4`": {"format": "nvfp4", "kv_cache": "nvfp4"},
    "mix of `nvfp4` and `fp8`": {"recipe": RECIPE},
    "mix of `w4a16_nvfp4` and `fp8`": {"recipe": f"w4a16_{RECIPE}"},
    **{
        f"mix of `nvfp4` and `{name}`": {"recipe": "nvfp4_mlp_only", "set": (f"*.self_attn.*={name}",)}
        for name in ("fp8_pb", "mxfp8", "fp8_pc_pt", "w4a8_nvfp4_fp8")
    },
    "mix of `nvfp4` and `fp8_pb`, `--fp8-pb-spelling modelopt`": {
        "recipe": "nvfp4_mlp_only",
        "set": ("*.self_attn.*=fp8_pb",),
        "options": SPELLED,
    },
}
SHOWN = {  # releases on both sides of every change, the oldest first
    engine: sorted({release for one in found.values() for release in (before(one.since), one.since)}, key=release_of)
    for engine, found in CHANGES.items()
}


def shown(words: dict[str, str]) -> str:
    """Release -> word, as a cell: the first word, and since when it is another."""
    cell, last = [], ""
    for release, word in words.items():
        if word != last:
            cell.append(f"{word} since {release}" if last else word)
        last = word
    return ", ".join(cell)


@cache
def made(name: str) -> list[CheckpointView | None]:
    """Both models; None for what the exporter refuses."""
    found: list[CheckpointView | None] = []
    for config in (QWEN, QWEN_MOE):
        with suppress(ExportError):
            found.append(planned(config, **FORMS[name]))
    return found if len(found) == 2 else [*found, None]


def word_of(engine: str, release: str, said: CheckpointView | None) -> str:
    """What a release does with it on the GPU that suits it best."""
    if said is None:
        return "not written"
    found = {verdict_of(said, engine, release, gpu).effect for gpu in (None, "h200", "b200")}
    return next(effect.value for effect in reversed(Effect) if effect in found)


def cell_of(engine: str, name: str) -> str:
    dense, experts = (shown({one: word_of(engine, one, said) for one in SHOWN[engine]}) for said in made(name))
    return dense if dense == experts else f"{dense}; experts {experts}"


def test_the_page_shows_what_each_release_does_with_each_format() -> None:
    for name in FORMS:
        line = f"| {name} | {' | '.join(cell_of(engine, name) for engine in ENGINES)} |"
        assert line in PAGE.splitlines(), line


def test_the_page_shows_what_differs_between_releases() -> None:
    for engine, found in CHANGES.items():
        for since in dict.fromkeys(one.since for one in found.values()):
            of_release = [one for one in found.values() if one.since == since]
            how = "run" if all(one.seen for one in of_release) else "read"
            line = f"| {ENGINES[engine].NAME} {since} | {'; '.join(one.says for one in of_release)} | {how} |"
            assert line in PAGE.splitlines(), line
