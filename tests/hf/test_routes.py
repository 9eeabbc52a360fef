"""The same weights and statistics from a transformers model and from a Megatron model: the same checkpoint, byte for byte."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_export import calibrate, export_hf_checkpoint
from megatron_export.formats import FORMATS
from megatron_export.mcore.build import build_model
from megatron_export.mcore.load_hf import load_hf_weights
from megatron_export.mcore.parallel_state import current, started

from ..support.live import batches, refusal
from ..support.live import loaded as in_megatron
from ..support.live_hf import assert_untouched, loaded, state_of, traces_of
from ..support.models import LENGTH, assert_same, contents, make_model, read_json, tensors
from ..support.ranks import Ranks

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}  # which groups of 128 divide
EXPERTS = WIDE | {"moe_intermediate_size": 128}
MODELS = {
    "llama31": WIDE,
    "qwen2": WIDE | {"tie_word_embeddings": True},
    "qwen3_moe": EXPERTS,
    "mixtral": WIDE,
    "deepseek_v3": EXPERTS | {"q_lora_rank": 128, "kv_lora_rank": 128, "num_nextn_predict_layers": 0},
    "glm4_moe": EXPERTS,
    "gpt_oss": WIDE,
    "llama4": WIDE | {"intermediate_size": 128, "intermediate_size_mlp": 256},
    "nemotron_h": EXPERTS | {"moe_latent_size": 128, "moe_shared_expert_intermediate_size": 128},
}
# Whose tensors have other names or shapes in memory than on disk, or which see.
OTHERS = {
    "minimax_m2": WIDE,
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
    "mistral3": {},
    "gemma3_vision": {},
    "qwen3_5": {},
}
FEW = ("bf16", "fp8", "w4a16_nvfp4")
NONE = ("bf16", "fp8_pb", "fp8_pc_pt", "mxfp8", "w4a16_nvfp4", "mxfp4")  # which measure nothing
CACHES = ("llama31", "qwen2", "qwen3_moe", "mixtral", "glm4_moe", "nemotron_h")


def by_both_routes(name: str, source: Path, folder: Path, forms: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """In a rank: export a model in these formats by both routes; returns what each refused, by format."""
    refused = {}
    with started(1, 1, "cpu"):
        with current() as here:
            config = read_json(source / "config.json")
            megatron = build_model(config, here, max_sequence_length=LENGTH)
            load_hf_weights(megatron, source, config, here)
        searched = [form for form in ("int4_awq", "nvfp4_awq") if form in forms]
        smoothed = [form for form in searched if not refusal_of(megatron, source, folder, form)]
        found = calibrate(megatron, batches(source), format=tuple(smoothed) or "fp8")
        model = loaded(source, name)
        state, traces = state_of(model), traces_of(model)
        for form in forms:
            options = {"format": form, "calibration": None if form in NONE else found}
            options |= {"kv_cache": "fp8", "calibration": found} if name in CACHES and form == "nvfp4" else {}
            refused[form] = tuple(
                refusal(export_hf_checkpoint, one, folder / route / form, **options, **where)
                for route, one, where in (("megatron", megatron, {"hf_model": source}), ("transformers", model, {}))
            )
        assert_untouched(model, state, traces)
    return refused


def round_biases(source: Path) -> None:
    """transformers loads the biases of MiniMax's routers in bfloat16, and Megatron in float32."""
    held = tensors(source)
    rounded = {name: tensor.bfloat16() for name, tensor in held.items() if name.endswith("e_score_correction_bias")}
    save_file(held | rounded, source / "model.safetensors", {"format": "pt"})


def refusal_of(megatron: object, source: Path, folder: Path, form: str) -> str:
    """Why a format of AWQ is not for a model, apart from lacking statistics; "" if it is."""
    said = refusal(export_hf_checkpoint, megatron, folder / "never", hf_model=source, format=form)
    return "" if "needs calibration" in said else said


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("llama31", "deepseek_v3") else [pytest.mark.whole])
        for name in MODELS | OTHERS
    ],
)
def test_both_routes_write_the_same_checkpoint_in_every_format(name: str, ranks: Ranks, tmp_path: Path) -> None:
    source = make_model(tmp_path, name, **(MODELS | OTHERS)[name])
    if name == "minimax_m2":
        round_biases(source)
    forms = FEW if name in OTHERS else tuple(FORMATS)
    (refused,) = ranks.call(1, by_both_routes, name, source, tmp_path / "out", forms, seconds=400)
    assert [form for form, (one, other) in refused.items() if one != other] == []
    made = [form for form, (one, _) in refused.items() if not one]
    assert {"bf16", "fp8" if name != "gpt_oss" else "mxfp4"} <= set(made)
    for form in made:
        left, right = (contents(tmp_path / "out" / route / form) for route in ("megatron", "transformers"))
        assert sorted(left) == sorted(right)
        assert [file for file in left if left[file] != right[file]] == []


def without_hf_model(source: Path, folder: Path) -> str:
    """In a rank: export a Megatron model that names its HF model, as Megatron-Bridge's do, and one that does not."""
    with in_megatron(source) as (model, _):
        said = refusal(export_hf_checkpoint, model, folder / "never", format="bf16")
        model.config.hf_model_id = str(source)
        export_hf_checkpoint(model, folder / "out", format="bf16")
    return said


def test_a_megatron_model_that_names_its_hf_model_needs_no_other_word(
    models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    (said,) = ranks.call(1, without_hf_model, models["qwen2"], tmp_path)
    assert said.startswith("hf_model is missing, and the model does not say which HF model it is")
    assert_same(tensors(tmp_path / "out"), tensors(models["qwen2"]))
