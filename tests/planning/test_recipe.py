"""Recipes: what a file may say, and what those that are known by name do."""

from pathlib import Path

import pytest

from megatron_export.common.errors import ExportError
from megatron_export.planning.plan import assumed, make_plan
from megatron_export.planning.recipe import Line, names, recipe_of
from megatron_export.planning.request import Request

from ..support.models import GOLDEN, read_json

MOE = read_json(GOLDEN / "models" / "qwen3moe-bf16" / "config.json")
PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize("name", names())
def test_a_recipe_that_is_known_by_name_fits_a_model_with_experts_and_is_on_its_page(name: str) -> None:
    plan = make_plan(MOE, assumed(MOE, 2), Request(recipe=name))
    assert plan.format == name
    wanted = {line.format for line in recipe_of(name).lines}
    assert {form.name for form in plan.forms} <= wanted
    assert len(plan.forms) == len(wanted)
    assert f"| `{name}` |" in PAGE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("formats: [{'*': nvfp5}]", "unknown format 'nvfp5'. Did you mean 'nvfp4'?"),
        ("formats: {'*': nvfp4}", "it has no list `formats`"),
        ("formats: ['*']", "'*' is no glob with its format"),
        ("formats: [{'*': fp8, '*.o_proj': nvfp4}]", "is no glob with its format"),
        ("formats: [{'*': fp8}]\nkv: fp8", "unknown key 'kv'. A recipe has published, formats, options"),
        ("formats: [{'*': fp8}]\noptions: [1]", "options is [1], not a table"),
        ("formats: [{'*': fp8}]\noptions: {tp: 2}", "option 'tp' is not known"),
        ("formats: [{'*': fp8}]\noptions: {kv_cache: fp9}", "option kv_cache must be one of"),
        ("formats: [{'*': fp8}]\noptions: {group_size: 64}", "--group-size has no effect"),
        ("formats: [{'*': fp8}, {'*.w9': nvfp4}]", "own.yaml: *.w9: nvfp4 matches no module"),
        ("- fp8", "not a recipe, but ['fp8']"),
        ("formats: [", "not a recipe"),
        ("!!python/object/apply:os.system ['true']", "not a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ExportError) as refused:
        make_plan(MOE, assumed(MOE, 1), Request(recipe=str(file)))
    assert said in str(refused.value)


def test_options_of_a_recipe_count_where_the_user_gives_none_and_the_last_line_that_matches(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("formats: [{'*': nvfp4}, {'*.self_attn.*': fp8}]\noptions: {kv_cache: fp8, nvfp4_scales: mse}")
    assert recipe_of(str(file)).lines[1] == Line("*.self_attn.*", "fp8", "own.yaml: *.self_attn.*: fp8")
    usual = Request(recipe=str(file)).plain()
    assert (usual.kv_cache, usual.options.nvfp4_scales) == ("fp8", "mse")
    assert Request(recipe=str(file), kv_cache="none").plain().kv_cache == "none"
    own = ("model.layers.0.*=bf16", "model.layers.0.mlp.experts=fp8")
    plan = make_plan(MOE, assumed(MOE, 1), Request(recipe=str(file), set=own))
    found = {module: form.name for module, form in plan.layers.items() if ".experts.0" in module or "o_proj" in module}
    assert set(found.values()) == {"fp8", "nvfp4"}
    assert {m: f for m, f in found.items() if ".0.mlp" in m or ".0.self" in m} == {
        f"model.layers.0.mlp.experts.0.{part}_proj": "fp8" for part in ("gate", "up", "down")
    }
