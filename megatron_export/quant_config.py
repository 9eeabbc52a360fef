"""The two descriptions of a quantized checkpoint: engines read one or the other, so both are made from one plan.

hf_quant_config.json is what TensorRT-LLM reads first; config.json's `quantization_config` is what vLLM and SGLang read
first. Both name the dialect's producer "modelopt": vLLM refuses the file from any other.
"""

from .plan import Plan

PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def hf_quant_config(plan: Plan) -> dict | None:
    """The content of hf_quant_config.json; None where nothing is quantized."""
    if not plan.form.QUANTIZATION:
        return None
    quantization = {
        "quant_algo": plan.form.QUANTIZATION["quant_algo"],
        "kv_cache_quant_algo": plan.kv.ALGORITHM if plan.kv else None,
        **plan.form.QUANTIZATION,
        "exclude_modules": list(plan.excluded),
    }
    return {"producer": PRODUCER, "quantization": quantization}


def quantization_config(plan: Plan) -> dict | None:
    """The value of `quantization_config` in config.json; None where nothing is quantized."""
    if not plan.form.QUANTIZATION:
        return None
    group = {"input_activations": plan.form.NUMBERS, "weights": plan.form.NUMBERS, "targets": ["Linear"]}
    kv = {"kv_cache_scheme": plan.kv.SCHEME} if plan.kv else {}
    return {
        "config_groups": {"group_0": group},
        "ignore": list(plan.excluded),
        **plan.form.QUANTIZATION,
        **kv,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


def config_json(plan: Plan) -> dict:
    """The source's own config, with the dtype of what was written and the description of the quantization."""
    config = {key: value for key, value in plan.config.items() if key != "quantization_config"}
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "bfloat16"
    quantization = quantization_config(plan)
    return config | ({"quantization_config": quantization} if quantization else {})
