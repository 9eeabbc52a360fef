"""The config.json of an EAGLE-3 draft: from its own settings and its base's config, never from elsewhere."""

import pytest

from megatron_export import ExportError
from megatron_export.models import architecture_of, parameters_of, shape_of
from megatron_export.models.eagle3 import eagle3_config

BASE = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "vocab_size": 500,
    "max_position_embeddings": 4096,
    "eos_token_id": [7, 9],
}
DRAFT = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
}


def test_a_draft_computes_as_it_was_trained_and_has_the_tokens_of_its_base() -> None:
    made = eagle3_config(BASE, DRAFT | {"draft_vocab_size": 100})
    assert (made["rms_norm_eps"], made["rope_theta"], made["rope_scaling"]) == (1e-5, 10000.0, None)
    assert (made["vocab_size"], made["draft_vocab_size"], made["eos_token_id"]) == (500, 100, [7, 9])
    assert made["max_position_embeddings"] == 4096


def test_each_engine_finds_the_layers_of_the_base_where_it_looks() -> None:
    made = eagle3_config(BASE, DRAFT)
    assert made["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert made["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # vLLM counts the embedding
    assert shape_of(made).read == 3


def test_a_map_of_tokens_is_there_only_where_the_draft_knows_fewer() -> None:
    assert parameters_of(eagle3_config(BASE, DRAFT | {"draft_vocab_size": 100}))["d2t"].shape == (100,)
    whole = eagle3_config(BASE, DRAFT)
    assert "d2t" not in parameters_of(whole)
    assert whole["draft_vocab_size"] == 500  # SGLang takes the base's output layer where the key is null


def test_the_first_layer_reads_twice_as_much() -> None:
    found = parameters_of(eagle3_config(BASE, DRAFT))
    shapes = [found[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"].shape for layer in (0, 1)]
    assert shapes == [(256, 128), (256, 64)]
    names = [name for source in found.values() for name in source.names().values()]
    assert len(set(names)) == len(names)
    assert architecture_of(eagle3_config(BASE, DRAFT)).draft


@pytest.mark.parametrize("key", [key for key in DRAFT])
def test_a_setting_that_is_missing_is_named(key: str) -> None:
    with pytest.raises(ExportError, match=f"the draft's eagle_config has no {key}"):
        eagle3_config(BASE, DRAFT | {key: None})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32}, "the draft's hidden_size is 32, its base's 64"),
        ({"eagle_aux_hidden_state_layer_ids": [8]}, r"are \[8\], not a list of layers of its base, which has 8"),
        ({"eagle_aux_hidden_state_layer_ids": "all"}, "are 'all', not a list of layers"),
        ({"eagle_aux_hidden_state_layer_ids": [[1], "a"]}, "not a list of layers"),
        ({"draft_vocab_size": "many"}, "the draft's draft_vocab_size is 'many', and its base has 500 tokens"),
        ({"draft_vocab_size": 501}, "the draft's draft_vocab_size is 501, and its base has 500 tokens"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        eagle3_config(BASE, DRAFT | changes)
