"""What a Megatron checkpoint says of the model in it: where it contradicts config.json, and what ModelOpt did to it.

Megatron-LM keeps its arguments in `common.pt`, newer versions in an object among the tensors; Megatron-Bridge keeps its settings in
`run_config.yaml`. Both are compared with config.json, or it is made of them if there is none (derived.py). ModelOpt keeps its state
in a folder like a checkpoint of its own.
"""

from pathlib import Path
from typing import Any

from ..common.errors import ExportError
from ..common.safe_files import inside, shown
from ..models.stated_settings import differences
from .safe_pickle import WAY_OUT, Inert, check_size, clear_errors
from .torch_dist_storage import Storage
from .torch_save import read_saved

COMMON, RUN_CONFIG, MODELOPT = "common.pt", "run_config.yaml", "modelopt_state"
COMMON_OBJECT, ARGUMENTS = "common_state/", "args"
_MOST_YAML = 1 << 20
# What Megatron-LM calls some fields of `TransformerConfig` -> those fields.
_ARGUMENTS = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
# Megatron-LM's arguments that choose an activation, the first that is set -> what `TransformerConfig` then has.
_ACTIVATIONS = {"swiglu": "silu", "squared_relu": "squared_relu", "quick_geglu": "quick_gelu"}


def contradictions_of(storage: Storage, run: dict[str, Any], config: dict, mtp_dropped: bool) -> list[str]:
    """Where a checkpoint, or its run_config.yaml `run`, describes another model than config.json's dict, as sentences."""
    return [
        f"{storage.folder}: {where} say {name} = {shown(has)}, but config.json means {shown(means)}. Give the --hf-model that "
        "belongs to it"
        for where, said in sayings(
            storage, run, "; it is only compared with config.json, so a copy without this file is read too"
        )
        for name, has, means in differences(said, config, mtp_dropped=mtp_dropped)
    ]


def tensor_parallel_of(storage: Storage, run: dict[str, Any]) -> int | None:
    """The tensor-parallel size of the run that saved a checkpoint, of its experts if that is larger; None if it does not say."""
    names = ("tensor_model_parallel_size", "expert_tensor_parallel_size")
    said = [found.get(name) for _, found in sayings(storage, run) for name in names]
    return max((size for size in said if type(size) is int), default=None)


def sayings(storage: Storage, run: dict[str, Any], way_out: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Each source of settings, and its settings by the names of `TransformerConfig`; `way_out` of a file that is not read."""
    arguments = _common(storage, WAY_OUT + way_out).get(ARGUMENTS)
    arguments = arguments.state if isinstance(arguments, Inert) else arguments
    found = [("the arguments", named_arguments(arguments))] if arguments and isinstance(arguments, dict) else []
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


def named_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments, by the names of `TransformerConfig`."""
    said = {_ARGUMENTS.get(name, name): value for name, value in arguments.items()}
    if "swiglu" in arguments:
        said["gated_linear_unit"] = bool(arguments["swiglu"] or arguments.get("quick_geglu"))
        chosen = (name for flag, name in _ACTIVATIONS.items() if arguments.get(flag))
        said["activation_func"] = next(chosen, "gelu")
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
    said = model | next(inner, {})
    activation = said.get("activation_func")  # how Python imports it: its last word is the function
    activation = activation.get("_target_") if isinstance(activation, dict) else activation
    if isinstance(activation, str):
        said["activation_func"] = activation.rpartition(".")[2]
    said.setdefault("max_position_embeddings", said.get("seq_length"))
    return said
