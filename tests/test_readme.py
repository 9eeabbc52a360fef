"""README says what is there: every flag, the test command that CI runs, and the example's numbers."""

import json
import re
from dataclasses import fields
from pathlib import Path

from megatron_export.cli.config import ExportConfig, helps
from megatron_export.formats import FORMATS, KV_FORMATS
from megatron_export.models import ARCHITECTURES

from .support.models import EXAMPLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_flag_is_explained_in_readme_and_in_help() -> None:
    names = {field.name for field in fields(ExportConfig)}
    assert set(helps()) == names
    assert set(re.findall(r"--([a-z0-9-]+)", README.split("## The command")[1].split("```")[1])) - {
        "nproc-per-node"
    } == {name.replace("_", "-") for name in names}


def test_every_architecture_and_format_is_in_the_support_table() -> None:
    table = README.split("| | supported |")[1].split("## ")[0]
    for name in (*ARCHITECTURES, *(f"`{form}`" for form in (*FORMATS, *KV_FORMATS))):
        assert name in table


def test_the_examples_numbers_are_those_of_its_training() -> None:
    training = json.loads((EXAMPLE / "training.json").read_text())
    assert f"untrained it is {training['untrained_perplexity']:.0f}" in README
    assert f"trained with Megatron-Core for {training['seconds'] / 60:.1f} minutes" in README
    table = README.split("<!-- quality -->")[1].split("<!-- /quality -->")[0]
    assert all(f"\n| {form} |" in table for form in FORMATS)
    shown = float(re.search(r"\| bf16 \|[^|]*\|[^|]*\| ([\d.]+) \|", table)[1])
    assert abs(shown - training["heldout_perplexity"]) < 0.01  # measured by transformers, not by Megatron
    assert training["heldout_perplexity"] < training["untrained_perplexity"] / 100


def test_the_example_model_stays_small() -> None:
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 12_000_000
