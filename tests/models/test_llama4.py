"""Llama 4: what is in its stacked tensors, what is copied, what engines are told, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_export import ExportError, calibrate, export_hf_checkpoint
from megatron_export.checkpoint.hf_weights import copied_tensors
from megatron_export.mcore.config_check import contradictions
from megatron_export.models import settings_of, unscaled_rope_settings
from megatron_export.planning.engine_check import of_plan, verdicts

from ..export.test_topologies import calibration_flags, export
from ..support.experts import assert_single, assert_stacked
from ..support.live import batches, blank, loaded
from ..support.models import LENGTH, assert_same, behind, make_model, read_json, same, tensors
from ..support.plans import plan_of
from ..support.ranks import Ranks, living
from ..support.refusals import assert_says, refused

pytestmark = pytest.mark.whole

PREFIX = "language_model.model.layers.1.feed_forward.experts."
PLAIN = PREFIX.removeprefix("language_model.")
ENGINES = ("vLLM", "SGLang", "TensorRT-LLM")
STACKED_ONLY = "reads experts of Llama 4 only where they are stacked in one tensor"
SEEN = ("vision_model.", "multi_modal_projector.")


def exports(source: Path, out: Path, ep: int) -> None:
    """In a rank: fp8, fp8_pb and nvfp4."""
    with loaded(source, ep=ep) as (model, here):
        measured = calibrate(model, batches(source, 2)[here.dp_rank :: here.dp_size])
        for form in ("fp8", "fp8_pb", "nvfp4"):
            export_hf_checkpoint(model, out / form, hf_model=source, format=form, calibration=measured)


@pytest.fixture(scope="module")
def exported(pool: list[Ranks], models: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The tensors of the source and of what two expert-parallel ranks exported, each with the experts of half."""
    out = tmp_path_factory.mktemp("llama4")
    living(pool).call(2, exports, models["llama4_vision"], out, 2)
    return {"source": tensors(models["llama4_vision"])} | {folder.name: tensors(folder) for folder in out.iterdir()}


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_a_stack_holds_each_experts_codes_transposed_under_one_scale(form: str, stack: str, exported: dict) -> None:
    original = exported["source"][PREFIX + stack]  # [experts, in, out]
    found = behind(PREFIX + stack, exported[form])
    suffixes = {"", "_weight_scale", "_input_scale"} | ({"_weight_scale_2"} if form == "nvfp4" else set())
    assert found.keys() == suffixes
    assert found["_input_scale"].shape == () and found["_input_scale"] > 0
    assert_stacked(found, original, form)


def test_formats_that_no_engine_reads_stacked_are_written_expert_by_expert(exported: dict) -> None:
    original, found = exported["source"][PREFIX + "gate_up_proj"], exported["fp8_pb"]
    assert PREFIX + "gate_up_proj" not in found
    assert_single(found, PREFIX, original, "fp8_pb")


@pytest.mark.parametrize("form", ["fp8", "fp8_pb", "nvfp4"])
def test_what_megatron_does_not_have_is_copied_as_it_is(form: str, exported: dict) -> None:
    def seen(held: dict) -> dict:
        return {name: tensor for name, tensor in held.items() if name.startswith(SEEN)}

    assert len(seen(exported["source"])) > 40
    assert_same(seen(exported[form]), seen(exported["source"]))


@pytest.mark.parametrize(("form", "quantized"), [("fp8", True), ("fp8_pb", False), ("nvfp4", False)])
def test_q_and_k_are_quantized_only_where_engines_can_turn_rows(form: str, quantized: bool, exported: dict) -> None:
    for layer in range(4):
        for part in "qkv":
            weight = exported[form][f"language_model.model.layers.{layer}.self_attn.{part}_proj.weight"]
            assert (weight.dtype is not torch.bfloat16) is quantized


def flags(source: Path, out: Path, *others: object) -> tuple:
    return ("--hf-model", source, "--output", out, *calibration_flags(source), *others)


def test_the_command_exports_it_and_says_what_engines_do_with_it(ranks: Ranks, models: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = export(ranks, 2, *flags(models["llama4_vision"], out, "--format", "nvfp4", "--tp", 2))
    assert "q, k and v stay in bfloat16" in said
    assert re.search(r"SGLang +refused: .* does not load stacked experts in nvfp4", said)
    quantization = read_json(out / "hf_quant_config.json")["quantization"]
    left = quantization["exclude_modules"]
    assert {"vision_model*", "multi_modal_projector*", "language_model.lm_head"} <= set(left)
    assert "language_model.model.layers.1.feed_forward.router" in left
    assert "vision_model.model.layers.0.self_attn.q_proj" in left
    assert not any(".experts" in module for module in left)
    config = read_json(out / "config.json")
    assert config["quantization_config"]["ignore"] == left
    del config["quantization_config"]
    assert config == read_json(models["llama4_vision"] / "config.json")


def test_excluded_stacks_are_named_as_engines_name_them(ranks: Ranks, models: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    others = ("--format", "fp8", "--exclude", "*layers.1.feed_forward.experts.*")
    export(ranks, 1, *flags(models["llama4_vision"], out, *others))
    left = read_json(out / "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert "language_model.model.layers.1.feed_forward.experts" in left
    found, source = tensors(out), tensors(models["llama4_vision"])
    name = "language_model.model.layers.{}.feed_forward.experts.gate_up_proj"
    assert same(found[name.format(1)], source[name.format(1)])
    assert found[name.format(3)].dtype is torch.float8_e4m3fn


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_experts_of_a_model_that_does_not_see_are_written_one_by_one_but_for_bf16(
    form: str, ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    stack = f"{PLAIN}gate_up_proj"
    original = tensors(models["llama4"])[stack]
    said = export(ranks, 2, *flags(models["llama4"], tmp_path / form, "--format", form, "--tp", 2))
    assert [bool(re.search(rf"^{engine} +loads", said, re.M)) for engine in ENGINES] == [True, False, False]
    assert "it loads experts of Llama 4 only in Llama4ForConditionalGeneration" in said
    assert "it has Llama 4 only as Llama4ForConditionalGeneration" in said
    found = tensors(tmp_path / form)
    assert not any(name.startswith(stack) for name in found)
    assert_single(found, PLAIN, original, form)
    export(ranks, 1, "--hf-model", models["llama4"], "--output", tmp_path / "bf16", "--format", "bf16")
    assert same(tensors(tmp_path / "bf16")[stack], original)


def written(folder: Path, like: Path, held: dict[str, Tensor]) -> Path:
    """A checkpoint with the config of another and these tensors."""
    folder.mkdir()
    save_file(held, folder / "model.safetensors")
    shutil.copyfile(like / "config.json", folder / "config.json")
    return folder


def test_tensors_in_other_types_are_copied_in_theirs(ranks: Ranks, models: dict, tmp_path: Path) -> None:
    held = tensors(models["llama4_vision"])
    held["vision_model.layernorm_pre.weight"] = held["vision_model.layernorm_pre.weight"].float() / 3
    held["vision_model.layernorm_post.weight"] = held["vision_model.layernorm_post.weight"].half() / 3
    source = written(tmp_path / "mixed", models["llama4_vision"], held)
    export(ranks, 1, "--hf-model", source, "--output", tmp_path / "out", "--format", "bf16")
    assert_same(tensors(tmp_path / "out"), held)


def test_an_original_without_the_parts_that_see_is_refused(ranks: Ranks, models: dict, tmp_path: Path) -> None:
    held = {name: t for name, t in tensors(models["llama4_vision"]).items() if not name.startswith(SEEN)}
    source = written(tmp_path / "blind", models["llama4_vision"], held)
    said = refused(ranks, tmp_path, "--hf-model", source, "--output", tmp_path / "out", "--format", "bf16")
    assert_says(said, "no tensor vision_model.*", "no tensor multi_modal_projector.*")


def test_samples_longer_than_a_chunk_of_attention_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    source = make_model(tmp_path, "llama4", attention_chunk_size=16)
    said = refused(ranks, tmp_path, *flags(source, tmp_path / "out"))
    assert_says(said, "beyond 16 this model attends in chunks")


def all_experts(source: Path) -> tuple[dict[str, float], float]:
    """In a rank: input maxima of layer 1's linears when all experts see all tokens; the largest product of a token and a score."""
    with loaded(source) as (model, _):
        layer, products = model.decoder.layers[1].mlp, []

        def called(module: torch.nn.Module, args: tuple) -> None:
            tokens = args[0].flatten(0, -2)
            scores = (tokens @ layer.router.weight.T).float().sigmoid().bfloat16()
            products.append((tokens.abs().amax(1, keepdim=True) * scores).max().item())

        hook = layer.register_forward_pre_hook(called)
        found = calibrate(model, batches(source), all_experts=True)
        hook.remove()
    prefix = "decoder.layers.1.mlp."
    keys = [key for key in found if key.startswith(prefix) and key.endswith(".input_amax")]
    return {key.removeprefix(prefix).removesuffix(".input_amax"): float(found[key]) for key in keys}, max(products)


def test_experts_that_are_shown_all_tokens_are_given_their_product_with_the_score(ranks: Ranks, models: dict) -> None:
    """As engines multiply it into the input; a bfloat16 score may be rounded otherwise by the router's own product."""
    found, product = ranks.call(1, all_experts, models["llama4"])[0]
    assert found["experts.linear_fc1"] == pytest.approx(product, rel=2**-7)
    assert found["experts.linear_fc1"] < found["shared_experts.linear_fc1"]


@pytest.mark.parametrize(
    ("name", "form", "loading", "because"),
    [
        ("llama4", "fp8", {"vLLM"}, "it has Llama 4 only as Llama4ForConditionalGeneration"),
        ("llama4", "int4_awq", set(), "it does not know W4A16_AWQ"),
        ("llama4_vision", "fp8_pb", {"vLLM", "SGLang"}, STACKED_ONLY),
        ("llama4_vision", "int4_awq", set(), STACKED_ONLY),
        ("llama4_vision", "nvfp4", {"vLLM", "TensorRT-LLM"}, "does not load stacked experts in nvfp4"),
    ],
)
def test_engines_say_what_they_do_with_the_experts_and_the_plan_does_not_repeat_it(
    name: str, form: str, loading: set, because: str, models: dict
) -> None:
    config = read_json(models[name] / "config.json")
    sizes = {"intermediate_size": 128, "intermediate_size_mlp": 128, "hidden_size": 128}
    config |= {"text_config": config["text_config"] | sizes} if "text_config" in config else sizes
    plan = plan_of(config, format=form)
    found = verdicts(of_plan(plan)).values()
    assert {verdict.engine for verdict in found if verdict.loads} == loading
    assert any(because in verdict.why for verdict in found)
    assert not any(engine in remark for engine in ENGINES for remark in plan.remarks)


@pytest.mark.parametrize(
    "glob", ["*.feed_forward.experts", "*.experts.gate_up_proj *.experts.down_proj", "vision_model*"]
)
def test_modules_are_excluded_by_the_names_that_files_have(glob: str, models: dict) -> None:
    source = models["llama4_vision"]
    config = read_json(source / "config.json")
    copied = copied_tensors(source, SEEN)
    plan = plan_of(config, format="fp8", exclude=tuple(glob.split()), copied=copied)
    stacks = [name for name in plan.quantized if ".experts." in name]
    assert len(stacks) == (4 if glob == "vision_model*" else 0)
    assert not any(".experts." in entry for entry in plan.excluded)
    assert ("language_model.model.layers.1.feed_forward.experts" in plan.excluded) == (not stacks)


def norms_everywhere(source: Path) -> list[str]:
    """In a rank: what is said of a model as Megatron's own spec makes it, with a norm in every layer."""
    config = read_json(source / "config.json")
    with blank(config, LENGTH) as (model, _):
        attentions = [layer.self_attention for layer in model.decoder.layers]
        attentions[3].q_layernorm = attentions[0].q_layernorm
        model.config.rotary_interleaved = False
        return contradictions(model, settings_of(config), unscaled_rope_settings(config))


def test_a_model_that_norms_or_rotates_otherwise_is_refused(ranks: Ranks, models: dict) -> None:
    rotation, norm = ranks.call(1, norms_everywhere, models["llama4"])[0]
    assert "rotary_interleaved = False" in rotation
    assert "layer 3, which it does not rotate" in norm


def test_more_than_one_expert_for_a_token_is_refused(models: dict) -> None:
    config = read_json(models["llama4"] / "config.json") | {"num_experts_per_tok": 2}
    with pytest.raises(ExportError, match="num_experts_per_tok = 2 is not supported; only 1 is"):
        settings_of(json.loads(json.dumps(config)))
