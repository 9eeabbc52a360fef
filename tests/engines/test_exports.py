"""The engines' rules on real exports: a plan and the folder that comes of it have the same verdict, and a target is heeded."""

from pathlib import Path

import pytest

from megatron_export.checkpoint.hf_weights import copied_tensors
from megatron_export.models import copied_prefixes
from megatron_export.planning.engine_check import of_folder, of_plan, verdicts

from ..export.test_topologies import export
from ..support.models import read_json
from ..support.plans import plan_of
from ..support.ranks import Ranks, command, living
from . import product

pytestmark = pytest.mark.whole

FORMS = ("bf16", "fp8_kv", "fp8_pb", "nvfp4_awq", "int4_awq")


@pytest.mark.parametrize("name", ["llama32", "deepseek_v3", "llama4_vision"])
def test_a_plan_has_the_verdict_of_the_folder_that_it_becomes(name: str, pool: list[Ranks], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = product.source(tmp_path, name)
    [refused] = living(pool).call(1, product.export, source, tmp_path / "out", list(FORMS))
    config = read_json(source / "config.json")
    copied = copied_tensors(source, copied_prefixes(config))
    for form in [form for form in FORMS if form not in refused]:
        settings = product.FORMATS[form]
        planned = of_plan(plan_of(config, copied=copied, **settings))
        found = of_folder(tmp_path / "out" / form)
        assert found.whole.tensors == planned.whole.tensors
        assert verdicts(found) == verdicts(planned)


def test_a_target_that_refuses_is_an_error_of_the_library(pool: list[Ranks], models: dict, tmp_path: Path) -> None:
    names = ["fp8_pb_modelopt", "fp8_pb", "nvfp4_mlp_fp8_attention"]
    [refused] = living(pool).call(1, product.export, models["qwen3"], tmp_path, names, target="sglang")
    assert refused["fp8_pb_modelopt"].startswith("--target: SGLang will not load this: refuses FP8_PB_WO")
    assert "its 96 rows are no whole blocks of 128, which SGLang wants of joined linears" in refused["fp8_pb"]
    assert "it does not find q_proj, k_proj, v_proj of this architecture in quantized_layers" in refused[names[2]]
    assert not list(tmp_path.iterdir())


def test_a_target_that_refuses_ends_the_command_at_once(models: dict[str, Path], ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--device", "cpu", "--hf-model", models["qwen3"], "--format", "bf16", "--output", out)
    export(ranks, 2, "--tp", 2, *flags, "--target", "vllm,sglang")
    refusing = ("--format", "fp8_pb", "--fp8-pb-spelling", "modelopt")
    answers = ranks.call(2, command, "--tp", 2, *flags, *refusing, "--overwrite", "--target", "vllm,sglang")
    assert [status for status, _ in answers] == [1, 1]
    assert "--target: SGLang will not load this: refuses FP8_PB_WO (--fp8-pb-spelling native)" in answers[0][1]
    assert read_json(out / "config.json").get("quantization_config") is None
