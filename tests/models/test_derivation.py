"""config.json made of Megatron's settings: what engines and transformers read of it is what the model's own says."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_export.checkpoint.torch_dist_settings import named_arguments
from megatron_export.common.errors import ExportError
from megatron_export.engines import ENGINES
from megatron_export.models import ARCHITECTURES, parameters_of, rope_of, settings_of
from megatron_export.models.derivation import derived
from megatron_export.models.settled_settings import Stated
from megatron_export.planning.engine_check import of_plan, verdicts

from ..support.configs import DEEPSEEK_V3, LLAMA, LLAMA_70B, MIXTRAL, QWEN, QWEN_MOE
from ..support.models import hf_config
from ..support.plans import plan_of
from ..support.saving import arguments

WHERE = "the arguments"
ALONE = sorted(name for name, one in ARCHITECTURES.items() if not one.copied)
NAMES = (
    *(
        "llama31",
        "llama32",
        "qwen2",
        "qwen2_yarn",
        "qwen3",
        "qwen3_moe",
        "mixtral",
        "deepseek_v3",
        "glm4_moe",
        "gpt_oss",
    ),
    *("llama4", "mistral", "deepseek_v32", "glm_moe_dsa", "minimax_m2", "gemma3", "phi3", "qwen3_next", "qwen3_5_text"),
    *("qwen3_5_moe_text", "nemotron_h", "ministral3"),
)
# What Megatron's settings cannot say, and what Megatron-LM's arguments do not.
GIVEN = {
    "llama4": ("attention_chunk_size", "attn_temperature_tuning", "floor_scale", "attn_scale", "rope_scaling"),
    "gemma3": ("rope_local_base_freq",),
    "ministral3": ("rope_parameters",),
}
BESIDE: dict[str, dict] = {
    "gemma3": {"activation_func": "fast_gelu"},
    "glm_moe_dsa": {"dsa_indexer_topk_freq": 3, "dsa_indexer_rope_interleaved": True},
}
# Several architectures compute the same.
ALIKE = {
    **dict.fromkeys(
        ("llama31", "llama32", "ministral3"),
        "LlamaForCausalLM, MistralForCausalLM, Ministral3ForCausalLM and Phi3ForCausalLM",
    ),
    **dict.fromkeys(("mistral", "phi3"), "MistralForCausalLM, Ministral3ForCausalLM and Phi3ForCausalLM"),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), "DeepseekV32ForCausalLM and GlmMoeDsaForCausalLM"),
    "minimax_m2": "MiniMaxM2ForCausalLM and Glm4MoeForCausalLM",  # whose tensors differ
    "qwen3_5_moe_text": "Qwen3NextForCausalLM and Qwen3_5MoeForCausalLM",
}
# Keys that only training, other software or nobody reads: no engine and no rule here does.
UNREAD = {
    *("attention_dropout", "embd_pdrop", "resid_pdrop", "hidden_dropout", "initializer_range", "router_aux_loss_coef"),
    *(
        "router_jitter_noise",
        "output_router_logits",
        "rescale_prenorm_residual",
        "transformers_version",
        "use_cache",
        "_name_or_path",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # of the tokenizer
    "original_max_position_embeddings",  # of Phi 3, where rotations are scaled, which Megatron cannot
}
LLAMA3 = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}


def said_of(name: str, config: dict) -> dict[str, Any]:
    return named_arguments(vars(arguments(config))) | BESIDE.get(name, {})


def given_of(name: str, config: dict) -> dict[str, Any]:
    others = {"rope_local_base_freq": 10000.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}}
    return {key: config.get(key, others.get(key)) for key in GIVEN.get(name, ())}


def made(name: str, config: dict) -> dict:
    """config.json, made of the arguments that Megatron-LM would save for this one."""
    chosen = config["architectures"][0] if name in ALIKE else None
    return derived(Stated(WHERE, said_of(name, config)), chosen, given_of(name, config))


def as_transformers_reads(config: dict, folder: Path) -> dict:
    from transformers import AutoConfig

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder).to_dict()


def test_every_architecture_without_other_parts_is_made_here() -> None:
    assert sorted({hf_config(name)["architectures"][0] for name in NAMES}) == ALONE


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_of_the_arguments_is_read_as_the_original_is(name: str, tmp_path: Path) -> None:
    config = hf_config(name)
    found = made(name, config)
    theirs, ours = (as_transformers_reads(one, tmp_path / kind) for kind, one in (("a", config), ("b", found)))
    for same_meaning in (theirs, ours):  # where keys say one thing in two ways
        if theirs.get("indexer_types"):
            same_meaning.pop("index_topk_freq", None), same_meaning.pop("index_skip_topk_offset", None)
        if name == "qwen2_yarn":  # Megatron has numbers that HF's code fills in
            same_meaning["rope_parameters"] |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    differ = {key for key, value in theirs.items() if value is not None and ours.get(key) != value}
    assert differ - UNREAD == set()
    assert settings_of(found) == settings_of(config)
    shapes = [
        {one: (source.shape, source.names()) for one, source in parameters_of(it).items()} for it in (found, config)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("llama4", "gemma3")])
def test_positions_are_rotated_as_the_original_says(name: str) -> None:
    config = hf_config(name)
    assert rope_of(made(name, config)) == rope_of(config)


class Noted(dict):
    """A dict that notes which of its keys are read, in itself and in what it is joined to."""

    def __init__(self, values: dict, read: set[str]) -> None:
        super().__init__(values)
        self.read = read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __or__(self, other: dict) -> "Noted":
        return Noted({**self, **other}, self.read)

    def __ror__(self, other: dict) -> "Noted":
        return Noted({**other, **self}, self.read)


@pytest.mark.parametrize("name", NAMES)
def test_no_key_that_is_read_here_or_by_an_engines_rules_is_left_out(name: str) -> None:
    """What is noted: keys that the modules of `models` and `engines` read."""
    read: set[str] = set()
    config = Noted(hf_config(name), read)
    plan = plan_of(config, format="bf16")
    assert settings_of(config)
    assert len(verdicts(of_plan(plan))) == len(ENGINES)
    assert {"num_hidden_layers", "architectures", "vocab_size"} <= read
    assert not read & (UNREAD - {"original_max_position_embeddings"})
    found = made(name, hf_config(name))
    assert verdicts(of_plan(plan_of(found, format="bf16"))) == verdicts(of_plan(plan))
    spelled = {
        "rope_parameters",
        "layer_types",
        "indexer_types",
        "mlp_layer_types",
        "layers_block_type",
    }  # in other ways
    spelled |= {"mtp_layers_block_type", "num_local_experts", "no_rope_layer_interval", "_sliding_window_pattern"}
    assert {key for key in read - spelled if config.get(key) is not None} <= found.keys() | {"dtype", "num_experts"}


@pytest.mark.parametrize(
    "config", [LLAMA_70B, QWEN, QWEN_MOE, MIXTRAL, DEEPSEEK_V3], ids=lambda one: one["architectures"][0]
)
def test_full_sizes_come_back(config: dict) -> None:
    said = named_arguments(vars(arguments(config))) | {"max_position_embeddings": 4096}
    found = derived(Stated(WHERE, said), config["architectures"][0], {})
    extra = {"num_local_experts"} if "num_experts" in found else set()
    assert {key: found.get(key) for key in config if key not in extra} == {
        k: v for k, v in config.items() if k not in extra
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_is_known_unless_several_compute_the_same(name: str) -> None:
    config = hf_config(name)
    stated = Stated(WHERE, said_of(name, config))
    if name not in ALIKE:
        assert derived(stated, None, given_of(name, config))["architectures"] == config["architectures"]
        return
    first = ALIKE[name].partition(" ")[0].rstrip(",")
    with pytest.raises(
        ExportError, match=f"^the arguments fit {ALIKE[name]} alike. Choose one with --architecture {first}, "
    ):
        derived(stated, None, {})


def test_tensors_and_the_class_that_made_the_model_choose_among_those_that_fit() -> None:
    said = named_arguments(vars(arguments(LLAMA))) | {"max_position_embeddings": 4096}
    stated = Stated(WHERE, said, provider="MistralModelProvider7B")
    assert derived(stated, None, {})["architectures"] == ["MistralForCausalLM"]
    config = derived(Stated(WHERE, said), None, {}, lambda config: config["model_type"] == "phi3")
    assert config["architectures"] == ["Phi3ForCausalLM"]


def test_blocks_of_attention_and_experts_are_the_layers_of_other_models() -> None:
    """As newer versions of Megatron may build them."""
    config = hf_config("qwen3_next")
    said = said_of("qwen3_next", config)
    pattern = "".join("GE" if linear else "*E" for linear in said["linear_attention_freq"]).replace("*E", "*-", 1)
    without = ("linear_attention_freq", "moe_layer_freq", "num_layers")
    hybrid = {key: value for key, value in said.items() if key not in without} | {
        "hybrid_layer_pattern": pattern,
        "num_layers": 8,
    }
    found, meant = derived(Stated(WHERE, hybrid), None, {}), derived(Stated(WHERE, said), None, {})
    assert (found, found["mlp_only_layers"]) == (meant, [1])


def refused(
    changes: dict[str, Any], values: dict | None = None, lacking: Iterable[str] = (), name: str | None = None
) -> str:
    said = named_arguments(vars(arguments(QWEN_MOE))) | {"max_position_embeddings": 4096} | changes
    with pytest.raises(ExportError) as told:
        derived(
            Stated(WHERE, {k: v for k, v in said.items() if k not in lacking}, hf_model="org/it"), name, values or {}
        )
    assert len(str(told.value)) < 4000
    return str(told.value)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("num_layers", 10**100, "not a whole number of at least 1 and up to 1,000"),
        ("num_layers", True, "num_layers = True, not a whole number"),
        ("num_layers", 0, "num_layers = 0, not a whole number"),
        ("hidden_size", "6" * 10**6, "hidden_size = '666"),
        ("hidden_size", -64, "hidden_size = -64"),
        ("vocab_size", 1 << 40, "up to 16,777,216"),
        ("num_moe_experts", [4], r"num_moe_experts = \[4\]"),
        ("layernorm_epsilon", float("nan"), "layernorm_epsilon = nan, not a number"),
        ("rotary_base", {"a": 1}, "rotary_base = {"),
        ("rotary_base", 1e300, "rotary_base = 1e"),
        ("qk_layernorm", "yes", "qk_layernorm = 'yes', not true or false"),
        ("moe_layer_freq", [1] * 100_000, "moe_layer_freq = "),
        ("moe_layer_freq", [1, 1], "say moe_layer_freq for 2 layers, of 6"),
        ("moe_layer_freq", [2] * 6, "not a number or a list of 0 and 1"),
        ("window_size", (-1, 5), "not how many tokens before are seen, and 0"),
        ("activation_func", object, "not a word"),
        ("hybrid_layer_pattern", "M" * 10**6, "hybrid_layer_pattern = 'MMM"),
        ("hybrid_layer_pattern", "XYZ", "fit no architecture that is known"),
        ("softmax_scale", 1e-300, "fit no architecture that is known"),
        ("num_query_groups", 3, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ("moe_router_topk", 99, "num_experts_per_tok 99 of num_experts 8"),
        ("normalization", "LayerNorm", "normalization is 'LayerNorm', not 'RMSNorm'"),
        ("activation_func", "gelu", "activation_func is 'gelu', not 'silu'"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_at_once(setting: str, value: object, words: str) -> None:
    said = refused({setting: value})
    assert re.search(words, said), said
    assert "--hf-model (it was made of 'org/it')" in said


def test_what_is_not_said_is_named_with_the_flag_that_says_it() -> None:
    said = refused({}, lacking=("layernorm_epsilon", "max_position_embeddings"))
    assert (
        "the arguments do not say layernorm_epsilon: give it with --config-value rms_norm_eps=VALUE, or give --hf-model"
        in said
    )
    assert "max_position_embeddings=VALUE" in said
    stated = Stated(WHERE, said_of("gemma3", hf_config("gemma3")))
    with pytest.raises(
        ExportError,
        match="cannot say all of a Gemma3.*give what is missing with --config-value rope_local_base_freq=VALUE",
    ):
        derived(stated, None, {})


def test_what_the_user_gives_is_in_it() -> None:
    said = named_arguments(vars(arguments(QWEN_MOE)))
    values = {"max_position_embeddings": 77, "rope_scaling": {"rope_type": "dynamic"}, "anything": [1]}
    found = derived(Stated(WHERE, said), None, values)
    assert {key: found[key] for key in values} == values


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Qwen3MoeForCausalLLM", "is unknown. Did you mean 'Qwen3MoeForCausalLM'?"),
        ("KimiK25ForConditionalGeneration", "it has parts beside its language model"),
        (
            "MixtralForCausalLM",
            "the arguments say qk_layernorm = True, but a MixtralForCausalLM means False. Give another",
        ),
        ("LlamaForCausalLM", "the arguments say num_moe_experts = 8, but a LlamaForCausalLM means None"),
    ],
)
def test_an_architecture_that_is_not_right_is_refused(name: str, words: str) -> None:
    assert words in refused({}, name=name)
