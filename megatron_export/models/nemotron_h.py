"""NemotronHForCausalLM: Nemotron-H, Nano 2, Nemotron 3. Every layer is one block with one norm: a Mamba mixer, an attention without
rotation, an MLP or experts whose up is squared where it is above 0; experts may read and write a narrower latent.
"""

from ..common.errors import ExportError
from ..common.safe_files import shown
from .architecture import Architecture, Settings
from .layer_kinds import LETTERS, Kind, Layers
from .rules import Rule, Table, qkv, same, vocab
from .segment_layouts import Segments
from .shape import ModelShape
from .written_keys import routed

# fmt: off
RULES: Table = {
    "embedding.word_embeddings.weight":                     vocab("backbone.embeddings.weight"),
    "decoder.layers.{l}.input_layernorm.weight":            same("backbone.layers.{l}.norm.weight"),
    "decoder.layers.{l}.mixer.in_proj.weight":
        Rule("backbone.layers.{l}.mixer.in_proj.weight", lambda shape: Segments(shape.mamba.segments, (5,))),
    "decoder.layers.{l}.mixer.conv1d.weight":
        Rule("backbone.layers.{l}.mixer.conv1d.weight", lambda shape: Segments(shape.mamba.convolved, (3,))),
    "decoder.layers.{l}.mixer.conv1d.bias":
        Rule("backbone.layers.{l}.mixer.conv1d.bias", lambda shape: Segments(shape.mamba.convolved, (3,))),
    "decoder.layers.{l}.mixer.A_log":                       same("backbone.layers.{l}.mixer.A_log"),
    "decoder.layers.{l}.mixer.D":                           same("backbone.layers.{l}.mixer.D"),
    "decoder.layers.{l}.mixer.dt_bias":                     same("backbone.layers.{l}.mixer.dt_bias"),
    "decoder.layers.{l}.mixer.norm.weight":                 same("backbone.layers.{l}.mixer.norm.weight"),
    "decoder.layers.{l}.mixer.out_proj.weight":             same("backbone.layers.{l}.mixer.out_proj.weight"),
    "decoder.layers.{l}.self_attention.linear_qkv.weight":  qkv("backbone.layers.{l}.mixer.{part}_proj.weight"),
    "decoder.layers.{l}.self_attention.linear_proj.weight": same("backbone.layers.{l}.mixer.o_proj.weight"),
    "decoder.layers.{l}.pre_mlp_layernorm.weight":          same("backbone.layers.{l}.norm.weight"),
    "decoder.layers.{l}.mlp.linear_fc1.weight":             same("backbone.layers.{l}.mixer.up_proj.weight"),
    "decoder.layers.{l}.mlp.linear_fc2.weight":             same("backbone.layers.{l}.mixer.down_proj.weight"),
    "decoder.layers.{l}.mlp.router.weight":                 same("backbone.layers.{l}.mixer.gate.weight"),
    "decoder.layers.{l}.mlp.router.expert_bias":            same("backbone.layers.{l}.mixer.gate.e_score_correction_bias"),
    "decoder.layers.{l}.mlp.experts.{e}.linear_fc1.weight": same("backbone.layers.{l}.mixer.experts.{e}.up_proj.weight"),
    "decoder.layers.{l}.mlp.experts.{e}.linear_fc2.weight": same("backbone.layers.{l}.mixer.experts.{e}.down_proj.weight"),
    "decoder.layers.{l}.mlp.shared_experts.linear_fc1.weight":
        same("backbone.layers.{l}.mixer.shared_experts.up_proj.weight"),
    "decoder.layers.{l}.mlp.shared_experts.linear_fc2.weight":
        same("backbone.layers.{l}.mixer.shared_experts.down_proj.weight"),
    "decoder.layers.{l}.mlp.fc1_latent_proj.weight":        same("backbone.layers.{l}.mixer.fc1_latent_proj.weight"),
    "decoder.layers.{l}.mlp.fc2_latent_proj.weight":        same("backbone.layers.{l}.mixer.fc2_latent_proj.weight"),
    "decoder.layers.{l}.enorm.weight":                      same("backbone.layers.{l}.enorm.weight"),
    "decoder.layers.{l}.hnorm.weight":                      same("backbone.layers.{l}.hnorm.weight"),
    "decoder.layers.{l}.eh_proj.weight":                    same("backbone.layers.{l}.eh_proj.weight"),
    "decoder.layers.{l}.final_layernorm.weight":            same("backbone.layers.{l}.final_layernorm.weight"),
    "decoder.final_layernorm.weight":                       same("backbone.norm_f.weight"),
    "output_layer.weight":                                  vocab("lm_head.weight"),
}
# fmt: on
_SPELLED = {
    **{letter: kind for kind, letter in LETTERS.items() if kind is not Kind.LINEAR},
    **{
        "mamba": Kind.MAMBA,
        "linear_attention": Kind.MAMBA,
        "attention": Kind.ATTENTION,
        "full_attention": Kind.ATTENTION,
    },
    **{"mlp": Kind.MLP, "moe": Kind.EXPERTS},
}


def _blocks(config: dict, *keys: str) -> tuple[Kind, ...]:
    """The kinds that the first of `keys` that is there lists, as letters or as words; `ExportError` for one that is not known."""
    key = next((key for key in keys if config.get(key)), None)
    if key is None:
        return ()
    said = config[key]
    listed = said if isinstance(said, list) else list(said) if isinstance(said, str) else [said]
    if unknown := [one for one in listed if not isinstance(one, str) or one not in _SPELLED]:
        known = ", ".join(f"{letter} ({kind.value})" for letter, kind in _SPELLED.items() if len(letter) == 1)
        raise ExportError(
            f"config.json: {key} has a layer {shown(unknown[0])}, which this architecture does not have. Known are {known}"
        )
    return tuple(_SPELLED[one] for one in listed)


def _decoder(config: dict) -> tuple[Kind, ...]:
    return _blocks(config, "hybrid_override_pattern", "layers_block_type")


def layers(config: dict, sparse: tuple[int, ...]) -> Layers:
    """One kind for each layer of the pattern; those that predict one more token repeat a pattern of their own."""
    kinds, count = _decoder(config), config["num_hidden_layers"]
    if len(kinds) != count:
        raise ExportError(
            f"config.json: its pattern has {len(kinds)} layers, and num_hidden_layers is {count}. Give the config.json that "
            "belongs to these weights"
        )
    predicting = _blocks(config, "mtp_hybrid_override_pattern", "mtp_layers_block_type") or (
        Kind.ATTENTION,
        Kind.EXPERTS,
    )
    each = [(kind,) for kind in predicting]
    each[0], each[-1] = (*each[0], Kind.JOIN), (*each[-1], Kind.LAST)
    return (*((kind,) for kind in kinds), *each * (config.get("num_nextn_predict_layers") or 0))


def implied(config: dict) -> dict:
    """What some releases leave out, or call otherwise."""
    return {
        "num_hidden_layers": len(_decoder(config)) or None,
        "rms_norm_eps": config.get("norm_eps"),
        "head_dim": config.get("attention_head_dim"),
        "intermediate_size": config.get("moe_intermediate_size"),
    }


def respelled(config: dict) -> dict:
    """Lists of kinds in NVIDIA's words: transformers 5 has others for Mamba and attention, which SGLang does not know. And how many
    groups Mamba has, under the key that SGLang reads.
    """
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    lists = {key: config.get(key) for key in ("layers_block_type", "mtp_layers_block_type")}
    found = {key: [words.get(one, one) for one in kinds] for key, kinds in lists.items() if isinstance(kinds, list)}
    return found | ({"mamba_n_groups": config["n_groups"]} if "n_groups" in config else {})


def computed(config: dict, shape: ModelShape) -> dict:
    """The pattern as Megatron spells it, and sizes."""
    main = "".join(LETTERS[kinds[0]] for kinds in shape.kinds[: shape.layers])
    found: dict[str, object] = {"hybrid_layer_pattern": main}
    if mamba := shape.mamba:
        found |= {"mamba_num_heads": mamba.heads, "mamba_head_dim": mamba.width}
        found |= {"mamba_num_groups": mamba.groups, "mamba_state_dim": mamba.state}
    if shape.experts:
        found |= {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
        found |= {"moe_latent_size": shape.latent or None}
    return found


CONVOLVED = 4  # tokens that the convolution of Megatron's Mamba mixers sees: no setting of its own


def written(said: Settings) -> dict:
    """The pattern as letters; layers that predict one more token have one of their own, after a slash."""
    main, *predicting = (said["hybrid_layer_pattern"] or "").replace("|", "").split("/")
    if said["mtp_num_layers"] and not predicting:  # as older versions of Megatron say it
        predicting = [said["mtp_hybrid_override_pattern"] or "*E"] * said["mtp_num_layers"]
    found = routed(said) | {
        "hybrid_override_pattern": main,
        "num_hidden_layers": len(main),
        "mamba_num_heads": said["mamba_num_heads"],
        "mamba_head_dim": said["mamba_head_dim"],
        "n_groups": said["mamba_num_groups"],
        "ssm_state_size": said["mamba_state_dim"],
        "conv_kernel": CONVOLVED,
    }
    found.pop("first_k_dense_replace", None)
    if said["num_moe_experts"]:
        found |= {"moe_shared_expert_intermediate_size": said["moe_shared_expert_intermediate_size"] or 0}
        found |= {"n_shared_experts": int(bool(said["moe_shared_expert_intermediate_size"]))}
        found |= {"moe_latent_size": said["moe_latent_size"] or None}
    if predicting:
        found |= {"mtp_hybrid_override_pattern": predicting[0], "num_nextn_predict_layers": len(predicting)}
    return found


ARCHITECTURE = Architecture(
    rules=RULES,
    predicting="mtp.layers.",
    mtp_unseen=True,
    keys={"rms_norm_eps": "layer_norm_epsilon"},
    implied=implied,
    layers=layers,
    rotated=False,
    settings={"activation_func": "squared_relu", "gated_linear_unit": False},
    computed=computed,
    respelled=respelled,
    only={
        "mlp_hidden_act": ("relu2", None),
        "mamba_hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_bias": (False, None),
        "mamba_proj_bias": (False, None),
        "use_conv_bias": (True, None),
        "norm_topk_prob": (True, None),
        "mtp_use_repeated_layer": (True, None),
    },
    formats=(
        "bf16",
        "fp8",
        "fp8_pb",
        "fp8_pc_pt",
        "mxfp8",
        "mxfp4",
        "nvfp4",
        "w4a16_nvfp4",
        "w4a8_nvfp4_fp8",
        "w4a8_mxfp4_fp8",
    ),
    left={"w4a16_nvfp4": (".mixer.in_proj",)},
    left_why="in_proj of Mamba stays in bfloat16: SGLang does not load it so (--set GLOB=FORMAT quantizes it, for vLLM)",
    on_disk=((r"^model\.", "backbone."),),
    model_type="nemotron_h",
    written=written,
    unsmoothed="squared ReLU does not pass a vector on, experts may read a latent, and no engine's AWQ of Mamba was read",
)
