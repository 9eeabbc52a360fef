"""Smoothing changes no result: where every vector goes, checked by the logits of the smoothed, unquantized model.

The vectors are powers of two, so that no product rounds and float32 logits must come back. Of models with experts, what routers and
experts make of a token is computed here, from the names that HF's files have.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_export.calibration.lookup import measured
from megatron_export.formats import Options
from megatron_export.models.statistic_names import channels, input_key
from megatron_export.planning.plan import Plan

from ..support.models import make_model, read_json
from ..support.plans import plan_of

SHAPE = {"hidden_size": 128, "head_dim": 16, "intermediate_size": 384, "num_hidden_layers": 2}
MODELS = {  # queries per group: 2, 1, 4
    "llama32": SHAPE,
    "qwen2": {**SHAPE, "num_key_value_heads": 8},
    "qwen3": {**SHAPE, "num_key_value_heads": 2},
    "qwen2 grouped": SHAPE,
}
VARIANTS = {
    "folded": ("nvfp4_awq", Options()),
    "modelopt": ("nvfp4_awq", Options(awq_output="modelopt")),
    "int4": ("int4_awq", Options()),
}


def vectors_of(plan: Plan) -> dict[str, Tensor]:
    """Powers of two between 1/8 and 8 for every vector that the plan names, and maxima for the rest of what it needs."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for item in plan.items:
        if item.smoothed.columns is None:
            continue
        width = item.source.shape[1]
        vector = 2.0 ** torch.randint(-3, 4, (width,), generator=generator)
        if item.smoothed.columns.endswith("_shared"):
            layout = next(i.source.layout for i in plan.items if i.source.canonical.endswith("linear_qkv.weight"))
            heads = vector.view(-1, layout.queries_per_group, layout.head_dim)
            vector = heads[:, :1].expand_as(heads).reshape(-1)
        found[item.smoothed.columns] = vector
        found[channels(input_key(item.source.canonical.removesuffix(".weight")))] = torch.ones(width)
    return found


def smoothed_model(source: Path, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The bfloat16 tensors of the smoothed model, and what multiplies the input of a linear, by HF module."""
    tensors, kept = {}, {}
    hf = load_file(source / "model.safetensors")
    vectors = vectors_of(plan)
    for item in plan.items:
        parts = {part: hf[name] for part, name in item.source.names().items()}
        whole = item.source.layout.join(parts, item.source.shape[0])
        tensors |= {
            name: piece.data for name, piece in item.split(whole, 0, measured(item, vectors, whole.device)).items()
        }
        if item.smoothed.kept:
            names = item.source.names().values()
            kept |= {name.removesuffix(".weight"): vectors[item.smoothed.columns] for name in names}
    return tensors, kept


def logits(source: Path, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    missing, unexpected = model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()

    for name, vector in kept.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, vector=vector: (args[0] * vector,))
    with torch.no_grad():
        return model(torch.arange(48).view(2, 24)).logits


def planned(source: Path, variant: str, **settings: object) -> Plan:
    form, options = VARIANTS[variant]
    return plan_of(read_json(source / "config.json"), format=form, options=options, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_smoothed_model_computes_what_the_model_computes(name: str, variant: str, tmp_path: Path) -> None:
    source = make_model(tmp_path, name.split()[0], **MODELS[name])
    tensors, kept = smoothed_model(source, planned(source, variant))
    original = load_file(source / "model.safetensors")
    changed = {name for name in tensors if not torch.equal(tensors[name], original[name])}
    assert {"model.layers.0.input_layernorm.weight", "model.layers.1.mlp.gate_proj.weight"} <= changed
    assert ("model.layers.0.self_attn.v_proj.bias" in changed) == (
        name == "qwen2" and variant != "int4" or (name == "qwen2 grouped" and variant == "folded")
    )
    expected = logits(source, original, {})
    # Not equal to the bit: a float32 sum of products that were scaled channel by channel is the same sum in theory, but
    # norm(x) * w is rounded after another factor. 1e-5 is 100 roundings; a vector in a wrong place changes the first digits.
    torch.testing.assert_close(
        logits(source, tensors, kept), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )


SPARSE = {"qwen3_moe": 0, "mixtral": 0, "deepseek_v3": 1, "glm4_moe": 1}  # and a layer with experts
WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
UP_OF = {"down_proj": "up_proj", "w2": "w3"}


def answers(tensors: dict[str, Tensor], kept: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """What router and experts of a layer make of five tokens behind its second norm, by HF module, in float64: scores, gates,
    and down_proj of each up.
    """
    prefix = f"model.layers.{layer}."
    norm = tensors[f"{prefix}post_attention_layernorm.weight"].double()
    tokens = torch.randn(5, len(norm), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    normed = tokens / tokens.square().mean(dim=1, keepdim=True).sqrt() * norm
    read, made = {}, {}
    for name, weight in tensors.items():
        module, last = name.removesuffix(".weight"), name.split(".")[-2]
        if name.startswith(prefix) and ".self_attn." not in name and weight.dim() == 2:
            (read if last in UP_OF else made)[module] = weight.double()
    made = {module: normed @ weight.T for module, weight in made.items()}
    for module, weight in read.items():
        parent, _, last = module.rpartition(".")
        made[module] = (made.pop(f"{parent}.{UP_OF[last]}") * kept.get(module, 1)) @ weight.T
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SPARSE)
def test_a_token_is_routed_and_answered_as_before_its_norm_was_smoothed(
    name: str, variant: str, tmp_path: Path
) -> None:
    """To the bit. A router that is not divided by what its norm was multiplied with would give tokens to other experts."""
    narrow = {} if name == "mixtral" else {"moe_intermediate_size": 128}
    source = make_model(tmp_path, name, **WIDE, **narrow)
    tensors, kept = smoothed_model(source, planned(source, variant))
    original = load_file(source / "model.safetensors")
    before, after = answers(original, {}, SPARSE[name]), answers(tensors, kept, SPARSE[name])
    [router] = [module for module in before if module.endswith(".gate")]
    assert before.keys() == after.keys() and len(before) >= 1 + 2 * 4
    assert [module for module in before if not torch.equal(before[module], after[module])] == []
    for changed in (f"{router}.weight", f"model.layers.{SPARSE[name]}.post_attention_layernorm.weight"):
        assert not torch.equal(tensors[changed], original[changed])


@pytest.mark.parametrize(
    ("name", "variant", "kept"),
    [
        ("llama32", "folded", set()),
        ("llama32", "modelopt", {"o_proj"}),
        ("llama32", "int4", {"o_proj", "down_proj"}),
        ("qwen2", "folded", set()),
        ("qwen2", "modelopt", set()),
        ("qwen2", "int4", {"o_proj", "down_proj"}),
    ],
)
def test_what_keeps_pre_quant_scale(name: str, variant: str, kept: set, tmp_path: Path) -> None:
    plan = planned(make_model(tmp_path, name, **MODELS[name]), variant)
    outputs = [output.name for outputs in plan.files.values() for output in outputs]
    assert {output.split(".")[-2] for output in outputs if output.endswith("pre_quant_scale")} == kept


def test_a_linear_that_was_left_alone_takes_over_nothing(tmp_path: Path) -> None:
    """Its weight must stay what it is, so down_proj keeps its vector or, where there is no place for it, has none."""
    source = make_model(tmp_path, "llama32", **SHAPE)
    exclude = ("*.gate_proj", "*.up_proj", "*.q_proj", "*.k_proj", "*.v_proj")
    for variant, kept in (("folded", False), ("modelopt", True)):
        plan = planned(source, variant, exclude=exclude)
        items = {item.source.canonical: item for item in plan.items}
        alone = [item for item in plan.items if item.form is None]
        assert not any(item.smoothed.vectors for item in alone)
        for name in ("self_attention.linear_proj", "mlp.linear_fc2"):
            down = items[f"decoder.layers.0.{name}.weight"]
            assert (down.smoothed.columns is not None, down.smoothed.kept) == (kept, kept)
