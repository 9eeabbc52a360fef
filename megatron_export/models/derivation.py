"""config.json of a model that came without one, from the settings of Megatron that it was trained with: the way back.

Nothing is guessed. An architecture fits if what its config.json would mean is what the settings say; of several that fit, the user
chooses. What settings cannot say, the user gives.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..common.errors import ExportError, report
from ..common.safe_files import shown
from ..common.text import near
from .architecture import Architecture
from .registry import ARCHITECTURES
from .settled_settings import KEYS, Stated, settled
from .stated_settings import differences
from .transformer_config import megatron_llama3

_YARN = {  # setting -> key of the scaling
    "yarn_rotary_scaling_factor": "factor",
    "yarn_original_max_position_embeddings": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
    "yarn_correction_range_round_to_int": "truncate",
}
_LATENT_YARN = {  # the same of latent attention, with what Megatron computes where nothing is said
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
_FIXED = {  # keys that nobody gives -> why
    "architectures": "the architecture is given with --architecture",
    "model_type": "the architecture is given with --architecture",
    "torch_dtype": "what is not quantized is written in bfloat16. Leave it out",
    "dtype": "what is not quantized is written in bfloat16. Leave it out",
    "quantization_config": "the format is given with --format or --recipe",
}
# How far a difference is from fitting, if not 1: a model of another kind, and "", a config.json that cannot be.
_FAR = {"num_moe_experts": 10, "multi_latent_attention": 10, "hybrid_layer_pattern": 10, "": 3}


def derived(
    stated: Stated, name: str | None, values: Mapping[str, Any], fits: Callable[[dict], bool] = lambda config: True
) -> dict:
    """The config.json of a model with these settings, of the architecture `name`, or of the only one that fits; `values` are keys
    that the user gives, in place of settings. `fits` is asked where several do. `ExportError` says what is missing.
    """
    report([f"--config-value {key}: {why}" for key, why in _FIXED.items() if key in values])
    said = settled(stated, values)
    if name is not None:
        _check_name(name)
        config = _written(name, said, values)
        wrong = [
            f"{stated.where} say {key} = {shown(has)}, but a {name} means {shown(means)}"
            for key, has, means in _against(said, config)
        ]
        report([f"{one}. Give another --architecture, or {stated.way_out}" for one in wrong])
        return _complete(stated, name, config, values)
    tried = {one: _tried(one, said, values) for one in ARCHITECTURES if not _within(ARCHITECTURES[one])}
    found = {one: config for one, (config, wrong) in tried.items() if not wrong}
    if not found:
        raise ExportError(_nothing_fits(stated, {one: wrong for one, (_, wrong) in tried.items()}))
    chosen = _chosen(found, said, stated, fits)
    if len(chosen) > 1:
        *most, last = chosen
        raise ExportError(
            f"{stated.where} fit {', '.join(most)} and {last} alike. Choose one with --architecture {chosen[0]}, or give "
            f"{stated.way_out}"
        )
    return _complete(stated, chosen[0], found[chosen[0]], values)


def _tried(name: str, said: dict[str, Any], values: Mapping[str, Any]) -> tuple[dict, list[tuple[str, object, object]]]:
    """config.json as this architecture, and where that means something else."""
    try:
        config = _written(name, said, values)
        return config, _against(said, config)
    except ExportError as error:
        return {}, [("", str(error), name)]


def _written(name: str, said: dict[str, Any], values: Mapping[str, Any]) -> dict:
    """config.json of an architecture with these settings, whether it fits or not."""
    architecture = ARCHITECTURES[name]
    config: dict[str, Any] = {"architectures": [name]}
    config |= {key: said[setting] for setting, key in KEYS.items()}
    config |= {key: allowed[0] for key, allowed in architecture.only.items() if allowed[0] is not None}
    config |= {"model_type": architecture.model_type, **architecture.routing}
    config |= {key: bool(said.get(setting)) for key, (setting, _) in architecture.where.items()}
    if any(".eh_proj." in rule for rule in architecture.rules):
        config["num_nextn_predict_layers"] = said["mtp_num_layers"] or 0
    config |= architecture.written(said)
    if architecture.rotated and "rope_parameters" not in values:  # the newer spelling of all of it
        config |= _rotation(said, "rotary_dim" in config)
    config = {architecture.keys.get(key, key): value for key, value in config.items()}
    return config | {"torch_dtype": "bfloat16"} | values


def _rotation(said: dict[str, Any], in_numbers: bool) -> dict:
    """How positions are rotated; `in_numbers`: how much of a head is said already."""
    base = said["rotary_base"]
    found: dict[str, Any] = {} if base is None else {"rope_theta": float(base)}
    if said["rotary_percent"] != 1 and not in_numbers and not said["multi_latent_attention"]:
        found["partial_rotary_factor"] = said["rotary_percent"]
    return found | {"rope_scaling": _scaling(said)}


def _scaling(said: dict[str, Any]) -> dict | None:
    if said["multi_latent_attention"]:
        if said["rope_type"] == "rope" or (said["rotary_scaling_factor"] or 1) == 1:  # yarn by 1 changes nothing
            return None
        numbers = {name: usual if said[name] is None else said[name] for name, usual in _LATENT_YARN.items()}
        return {"rope_type": "yarn", "factor": said["rotary_scaling_factor"], **numbers}
    if said["position_embedding_type"] == "yarn":
        return {"rope_type": "yarn", **{key: said[name] for name, key in _YARN.items() if said[name] is not None}}
    if said["rope_scaling"]:
        return megatron_llama3(said["rope_scaling_factor"] or 8.0)
    if said["seq_len_interpolation_factor"]:
        return {"rope_type": "linear", "factor": said["seq_len_interpolation_factor"]}
    return None


def _against(said: Mapping[str, Any], config: dict) -> list[tuple[str, object, object]]:
    """Where config.json means something else than settings that were said."""
    there = {name: value for name, value in said.items() if value is not None}
    latent = any("linear_kv_down_proj" in rule for rule in ARCHITECTURES[config["architectures"][0]].rules)
    if latent != bool(said["multi_latent_attention"]):
        return [("multi_latent_attention", said["multi_latent_attention"], latent)]
    return differences(there | {"num_moe_experts": said["num_moe_experts"] or None}, config, alone=True)


def _within(architecture: Architecture) -> bool:
    """Whether it has parts that no checkpoint of Megatron has, so that it is never made of one alone."""
    return bool(architecture.copied) or not architecture.model_type


def _chosen(found: dict[str, dict], said: Mapping[str, Any], stated: Stated, fits: Callable[[dict], bool]) -> list[str]:
    """Of the architectures that fit, those that nothing else speaks against."""
    names = list(found)
    if not said["num_moe_experts"]:
        names = [one for one in names if not any("{e}" in rule for rule in ARCHITECTURES[one].rules)] or names
    provider = stated.provider.lower()
    if len(names) > 1 and provider:
        names = [one for one in names if provider.startswith(one.removesuffix("ForCausalLM").lower())] or names
    return [one for one in names if fits(found[one])] or names if len(names) > 1 else names


def _complete(stated: Stated, name: str, config: dict, values: Mapping[str, Any]) -> dict:
    """The same; `ExportError` for keys that change what it computes, and that are not there."""
    lacking = [key for key in ARCHITECTURES[name].unsaid if key not in config]
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "yarn" and not {"factor", "original_max_position_embeddings"} <= scaling.keys():
        lacking.append("rope_scaling")
    if lacking:
        flags = " ".join(f"{key}=VALUE" for key in lacking)
        raise ExportError(
            f"{stated.where} cannot say all of a {name}: give what is missing with --config-value {flags}, or give "
            f"{stated.way_out}"
        )
    return config


def _check_name(name: str) -> None:
    """Raise `ExportError` unless a config.json of this architecture can be derived."""
    alone = [one for one, architecture in ARCHITECTURES.items() if not _within(architecture)]
    if name in alone:
        return
    if name in ARCHITECTURES:
        raise ExportError(
            f"--architecture {name}: it has parts beside its language model, which a checkpoint of Megatron does not have. Give "
            "--hf-model with them"
        )
    meant = near(name, alone)
    raise ExportError(
        f"--architecture {shown(name)} is unknown. {f'Did you mean {meant!r}? ' if meant else ''}Known: {', '.join(alone)}"
    )


def _nothing_fits(stated: Stated, wrong: Mapping[str, list[tuple[str, object, object]]]) -> str:
    """Why no architecture fits: what speaks against the nearest ones."""
    nearest = sorted(wrong, key=lambda name: sum(_FAR.get(one[0], 1) for one in wrong[name]))[:3]
    why = "; ".join(f"{name} ({', '.join(dict.fromkeys(_short(*one) for one in wrong[name][:4]))})" for name in nearest)
    return f"{stated.where} fit no architecture that is known. Nearest are {why}. Give {stated.way_out}"


def _short(name: str, has: object, means: object) -> str:
    return f"{name} is {shown(has)}, not {shown(means)}" if name else str(has)
