"""What a Megatron checkpoint says of the model in it: where it contradicts config.json, and what ModelOpt did to it.

Megatron-LM keeps its arguments in `common.pt`, newer versions in an object among the tensors; Megatron-Bridge keeps its settings in
`run_config.yaml`. Both are only compared: config.json decides. ModelOpt keeps its state in a folder like a checkpoint of its own.
"""

from pathlib import Path
from typing import Any

from ..common.errors import ExportError
from ..common.safe_files import inside, shown
from ..models import settings_of, shape_of, unscaled_rope_settings
from ..models.layer_kinds import Kind
from .safe_pickle import WAY_OUT, Inert, check_size, clear_errors
from .torch_dist_storage import Storage
from .torch_save import read_saved

COMMON, RUN_CONFIG, MODELOPT = "common.pt", "run_config.yaml", "modelopt_state"
COMMON_OBJECT, ARGUMENTS = "common_state/", "args"
_MOST_YAML = 1 << 20
# What Megatron-LM calls some fields of `TransformerConfig` -> those fields.
_ARGUMENTS = {"norm_epsilon": "layernorm_epsilon", "num_experts": "num_moe_experts"}
_COMPARED = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size"),
    *("layernorm_epsilon", "normalization", "gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm"),
    *("rotary_base", "rotary_percent", "share_embeddings_and_output_weights", "multi_latent_attention"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "mtp_num_layers"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_layer_freq"),
    *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_enable_expert_bias"),
    *("attention_output_gate", "layernorm_zero_centered_gamma", "linear_attention_freq", "linear_conv_kernel_dim"),
    *(
        "hybrid_layer_pattern",
        "mamba_num_heads",
        "mamba_head_dim",
        "mamba_num_groups",
        "mamba_state_dim",
        "moe_latent_size",
    ),
    *("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"),
)
# If they are None, Megatron derives them from others.
_DERIVED = ("kv_channels", "ffn_hidden_size", "moe_ffn_hidden_size", "num_query_groups")
_PLAIN = {  # of a model whose config.json decides nothing about them
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "attention_output_gate": False,
    "layernorm_zero_centered_gamma": False,
    "rotary_percent": 1.0,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "mtp_num_layers": None,
}


def contradictions_of(storage: Storage, run: dict[str, Any], config: dict, mtp_dropped: bool) -> list[str]:
    """Where a checkpoint, or its run_config.yaml `run`, describes another model than config.json's dict, as sentences."""
    meant, problems = _meant(config), []
    for where, said in _sayings(storage, run):
        hybrid = said.get("hybrid_layer_pattern") or said.get("hybrid_override_pattern")  # whose layers are halves
        for name in _COMPARED:
            if name not in said or name not in meant or (said[name] is None and name in _DERIVED):
                continue
            if name == "hybrid_layer_pattern" and isinstance(hybrid, str):
                said[name] = hybrid.partition("/")[0].replace("|", "")
            if (mtp_dropped and name == "mtp_num_layers") or (hybrid and name in ("num_layers", "moe_layer_freq")):
                continue
            has, means = (_spelled(name, value, meant["num_layers"]) for value in (said[name], meant[name]))
            if has != means:
                problems.append(
                    f"{storage.folder}: {where} say {name} = {shown(said[name])}, but config.json means {shown(meant[name])}. "
                    "Give the --hf-model that belongs to it"
                )
    return problems


def tensor_parallel_of(storage: Storage, run: dict[str, Any]) -> int | None:
    """The tensor-parallel size of the run that saved a checkpoint; None if it does not say."""
    said = [found.get("tensor_model_parallel_size") for _, found in _sayings(storage, run)]
    return next((size for size in said if type(size) is int), None)


def _meant(config: dict) -> dict[str, Any]:
    """The values of `_COMPARED` that config.json means, without those that have no effect in its model."""
    shape = shape_of(config)
    meant = _PLAIN | settings_of(config) | unscaled_rope_settings(config)
    meant["share_embeddings_and_output_weights"] = shape.tied
    without = set()
    if shape.kv_lora:
        without |= {"kv_channels", "num_query_groups", "rotary_percent"}
    if meant["add_bias_linear"]:  # which gives q, k and v theirs
        without.add("add_qkv_bias")
    if "qk_l2_norm" in meant:  # norms without weights, which have a setting of their own
        without.add("qk_layernorm")
    if not shape.having(Kind.MLP):
        without.add("ffn_hidden_size")
    if meant.get("moe_router_score_function") == "sigmoid":
        without.add("moe_router_pre_softmax")
    return {name: value for name, value in meant.items() if name not in without}


def _spelled(name: str, value: object, layers: int) -> object:
    """A value, in the same spelling for all values that mean the same."""
    if name in ("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk") and value == 1:
        return None
    if name in ("mtp_num_layers", "moe_shared_expert_intermediate_size") and value == 0:
        return None
    if name == "linear_attention_freq" and type(value) is int and value > 0:
        return [int((layer + 1) % value != 0) for layer in range(layers)]
    if name == "moe_layer_freq" and type(value) is int and value > 0:
        return [int(layer % value == 0) for layer in range(layers)]
    return value


def _sayings(storage: Storage, run: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each source of settings, and its settings by the names of `TransformerConfig`."""
    way_out = f"{WAY_OUT}; it is only compared with config.json, so a copy without this file is read too"
    arguments = _common(storage, way_out).get(ARGUMENTS)
    arguments = arguments.state if isinstance(arguments, Inert) else arguments
    found = [("the arguments", _of_arguments(arguments))] if arguments and isinstance(arguments, dict) else []
    if run:
        found.append((f"the settings in {RUN_CONFIG}", _of_run(storage.folder, run)))
    return found


def _common(storage: Storage, way_out: str) -> dict[str, Any]:
    """The state that all ranks shared when they saved a checkpoint; {} if it was not saved."""
    path = inside(storage.folder, COMMON)
    if path.is_file():
        common = read_saved(path, way_out)
    elif key := next((key for key in storage.objects if key.startswith(COMMON_OBJECT)), None):
        common = storage.object(key)
    elif ARGUMENTS in storage.objects:  # of Megatron-FSDP
        common = {ARGUMENTS: storage.object(ARGUMENTS)}
    else:
        return {}
    if isinstance(common, list) and common:  # it holds a dict for each rank, of which there is one
        common = common[0]
    return common if isinstance(common, dict) else {}


def modes_of(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """What ModelOpt did to the model in a checkpoint, in order: ModelOpt's name of each step, and its settings."""
    place = folder / MODELOPT
    if not place.is_dir():
        return []
    if place.is_symlink():
        raise ExportError(f"{place} is a symbolic link, which is not followed. Give the checkpoint that it belongs to")
    path = inside(place, COMMON)
    common = read_saved(path, WAY_OUT) if path.is_file() else _common(Storage(place), WAY_OUT)
    with clear_errors(path):
        modes = common.get("modelopt_state_dict") if isinstance(common, dict) else None
        if not isinstance(modes, list) or not all(isinstance(mode, tuple) and len(mode) == 2 for mode in modes):
            raise ValueError("it does not say what ModelOpt did")
        settings = [(name, state.get("config") if isinstance(state, dict) else None) for name, state in modes]
        return [(str(name), config if isinstance(config, dict) else {}) for name, config in settings]


def _of_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    said = {_ARGUMENTS.get(name, name): value for name, value in arguments.items()}
    if "swiglu" in arguments:
        said["gated_linear_unit"] = bool(arguments["swiglu"] or arguments.get("quick_geglu"))
    if not arguments.get("group_query_attention"):
        said["num_query_groups"] = arguments.get("num_attention_heads")
    if "untie_embeddings_and_output_weights" in arguments:
        said["share_embeddings_and_output_weights"] = not arguments["untie_embeddings_and_output_weights"]
    return said


def run_of(folder: Path) -> dict[str, Any]:
    """The content of run_config.yaml, {} if there is none; no object that its tags name is made. `ExportError` if it is damaged."""
    path = inside(folder, RUN_CONFIG)
    if not path.is_file():
        return {}
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            """Merges of merges would double at each level; Megatron-Bridge writes none."""
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise ValueError("it merges tables")

    Loader.add_constructor(None, lambda loader, node: None)
    with clear_errors(path), path.open("rb") as file:
        text = file.read(_MOST_YAML + 1)
        if len(text) > _MOST_YAML:
            raise ValueError(f"more than {_MOST_YAML:,} bytes")
        try:
            run = yaml.load(text, Loader)  # noqa: S506 - a safe one
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"not YAML: {type(error).__name__}") from error
        check_size(run)
        if not isinstance(run, dict):
            raise ValueError("it has no settings of a model")
    return run


def _of_run(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The settings of the model in a run_config.yaml, at whichever level they are."""
    with clear_errors(folder / RUN_CONFIG):
        model = run.get("model")
        if not isinstance(model, dict):
            raise ValueError("it has no settings of a model")
    inner = (value for value in model.values() if isinstance(value, dict) and "num_layers" in value)
    return model | next(inner, {})
