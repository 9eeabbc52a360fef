"""What a report and a model card take from files of strangers: little of it, and as text."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_export.verify.report import facts, html, model_card
from megatron_export.verify.report.facts import Account, account_of
from megatron_export.verify.thresholds import Inspection, Wanted, inspected

from ..support.models import GOLDEN

ORIGINAL, QUANTIZED = GOLDEN / "models" / "llama-bf16", GOLDEN / "models" / "llama-NVFP4"


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("---\nlicense: mit\n" + "tags: x\n" * 9000, "mit"),
        ("---\nlanguage: en\n---\nlicense: mit\n---\n", ""),
        ("# A model\n---\nlicense: mit\n---\n", ""),
        ("---\n" + "x: y\n" * 9000 + "license: mit\n---\n", ""),  # beyond what is read
        ("---\nlicense: <b>\n---\n", ""),
        ("", ""),
    ],
)
def test_the_license_is_that_of_the_front_matter(card: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert facts._license(tmp_path) == found


def test_a_long_card_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n" + "license: x\n" * 8000)
    started = time.monotonic()
    facts._license(tmp_path)
    facts._FLAG.findall("-" * 50_000)
    assert time.monotonic() - started < 1


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    folder = tmp_path_factory.mktemp("quantized") / "nvfp4"
    folder.mkdir()
    for path in QUANTIZED.iterdir():
        shutil.copy(path, folder)
    return inspected(folder, ORIGINAL, Wanted())


RUNS: tuple[Any, ...] = (
    *(7, None, [], "x", {"seconds": 7, "tokens": 7, "alphas": 7, "calibration": 7, "topology": 7, "versions": 7}),
    {"seconds": {"a": "b"}, "alphas": {"layers.0.linear_fc1": "x"}, "tokens": {"layers.0.x": ["y"]}},
    {
        "sensitivities": {
            "decoder.layers.0.mlp.linear_fc1.sensitivity.nvfp4": -1,
            "x": 2,
            "layers.0.linear_fc1.sensitivity.": 1,
        }
    },
    {"seconds": {}, "tokens": {"layers.0.x": [], "layers.1.x": [-1]}, "versions": {"a": [1]}, "other": 3},
    {"calibration": {"a": {"b": ["/private/home/c"]}}},
)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("files", [{}, 7, None])
def test_a_manifest_that_says_nonsense_makes_a_report_all_the_same(
    run: Any, files: Any, inspection: Inspection
) -> None:
    path = inspection.judged.folder / "export_manifest.json"
    path.write_text(json.dumps({"kind": "megatron_export manifest 1", "run": run, "files": files}))
    told = account_of(inspection, "original")
    for text in (html.page(told), model_card.text(told)):
        assert "private" not in text


ODD = "`<script>x</script>\n# head\n- [a](http://b) \x1b[31m\u202e"


@pytest.mark.parametrize("made", [html.page, model_card.text], ids=["report", "card"])
def test_what_files_say_is_text_in_a_report_and_in_a_card(
    made: Callable[[Account], str], inspection: Inspection
) -> None:
    told = account_of(inspection, ODD, ODD)
    run = {"calibration": {ODD: ODD}, "versions": {ODD: ODD}}
    found = replace(told.found, problems=[ODD], unscored=ODD)
    text = made(replace(told, found=found, manifest={"run": run}, engines={ODD: ODD, "vLLM": f"loads {ODD}"}))
    assert "<script>x" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[31m" in text
    if made is model_card.text:
        assert not any(line.startswith(("# head", "- [a]")) for line in text.splitlines())
        assert "](" not in text
