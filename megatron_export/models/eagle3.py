"""LlamaForCausalLMEagle3: an EAGLE-3 draft, which guesses tokens from hidden states of the model beside it, its base.

It has no embedding: it takes the base's. Its first layer reads the embedding of a token beside a hidden state, so its q, k and v
have twice the columns. `fc` joins hidden states of several layers of the base into one. Where the draft knows fewer tokens than the
base, `d2t` says which: token i of the draft is token i + d2t[i] of the base.

Engines differ in what they call the norm before the attention of a later layer: `input_layernorm` (vLLM) or `hidden_norm` (SGLang,
TensorRT-LLM). It is written under both names. They differ in where they look for the layers of the base, too: vLLM counts the
embedding as layer 0, and reads the list on top of config.json first; SGLang reads the one in `eagle_config`, and adds 1 itself.
SGLang reads `fc` as plain numbers whatever config.json says, so `fc` and `lm_head` stay in bfloat16. Engines count or name the
layers otherwise than the file, so no list of excluded modules can tell them apart: all their linears have one format.
"""

from ..common.errors import report
from ..common.safe_files import shown
from .architecture import Architecture
from .rules import copies, gated, qkv, same, vocab

NAME = "LlamaForCausalLMEagle3"
# Words of the draft's own config.json, which whoever trained it must say.
REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "rope_theta", "eagle_aux_hidden_state_layer_ids")  # fmt: skip
_OF_BASE = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")

# fmt: off
ARCHITECTURE = Architecture(
    draft=True,
    formats=("bf16", "fp8", "nvfp4"),
    spelled={"fc": "*fc"},
    rules={
        "fc.weight":                                            same("fc.weight"),
        "enorm.weight":                                         same("layers.0.input_layernorm.weight"),
        "decoder.layers.0.input_layernorm.weight":              same("layers.0.hidden_norm.weight"),
        "decoder.layers.{l}.input_layernorm.weight":
            copies("layers.{l}.{part}.weight", "input_layernorm", "hidden_norm"),
        "decoder.layers.0.self_attention.linear_qkv.weight":    qkv("layers.0.self_attn.{part}_proj.weight"),
        "decoder.layers.{l}.self_attention.linear_qkv.weight":  qkv("layers.{l}.self_attn.{part}_proj.weight"),
        "decoder.layers.{l}.self_attention.linear_proj.weight": same("layers.{l}.self_attn.o_proj.weight"),
        "decoder.layers.{l}.pre_mlp_layernorm.weight":          same("layers.{l}.post_attention_layernorm.weight"),
        "decoder.layers.{l}.mlp.linear_fc1.weight":             gated("layers.{l}.mlp.{part}.weight"),
        "decoder.layers.{l}.mlp.linear_fc2.weight":             same("layers.{l}.mlp.down_proj.weight"),
        "decoder.final_layernorm.weight":                       same("norm.weight"),
        "output_layer.weight":                                  vocab("lm_head.weight"),
        "d2t":                                                  same("d2t"),
    },
    only={"attention_bias": (False, None), "mlp_bias": (False, None), "hidden_act": ("silu", None)},
)
# fmt: on


def eagle3_config(base: dict, said: dict) -> dict:
    """The config.json of a draft: `base` is that of its base, the language model's part of it; `said` are the draft's own settings
    under the words of config.json. `ExportError` lists what is missing, and what does not fit the base.

    Rotary embeddings are as the draft was trained: `rope_scaling` only if `said` has it.
    """
    report([f"the draft's eagle_config has no {word}" for word in REQUIRED if said.get(word) is None])
    ids, layers = said["eagle_aux_hidden_state_layer_ids"], base["num_hidden_layers"]
    problems = []
    if not isinstance(ids, list) or not ids or any(type(n) is not int or not 0 <= n < layers for n in ids):
        problems.append(
            f"the draft's eagle_aux_hidden_state_layer_ids are {shown(ids)}, not a list of layers of its base, which has {layers}"
        )
    if said["hidden_size"] != base["hidden_size"]:
        problems.append(
            f"the draft's hidden_size is {said['hidden_size']}, its base's {base['hidden_size']}: it reads the base's hidden "
            "states. Give the base that it was trained on"
        )
    known = said.get("draft_vocab_size") or base["vocab_size"]
    if type(known) is not int or not 0 < known <= base["vocab_size"]:
        problems.append(f"the draft's draft_vocab_size is {shown(known)}, and its base has {base['vocab_size']} tokens")
    report(problems)
    ids = sorted(ids)  # the base's layers are read in their order
    return {
        "architectures": [NAME],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": said.get("initializer_range") or 0.02,
        **{word: said[word] for word in REQUIRED[:-1]},
        "rope_scaling": said.get("rope_scaling"),
        **{word: base[word] for word in _OF_BASE if base.get(word) is not None},
        "draft_vocab_size": known,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "num_aux_hidden_states": len(ids),
        "eagle_aux_hidden_state_layer_ids": [number + 1 for number in ids],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": ids,
            "use_aux_hidden_state": True,
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
            "next_layer_regular": True,
            "parallel_draft_step": 1,
            "parallel_draft_heads_num_layers": 1,
        },
    }
