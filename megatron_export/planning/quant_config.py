"""The two descriptions of a quantized checkpoint, made from one plan: TensorRT-LLM reads hf_quant_config.json first, vLLM and
SGLang config.json's `quantization_config`. Both name the producer "modelopt", as vLLM refuses any other. FP8_PB in its native
spelling is described in config.json as DeepSeek's own checkpoints are.
"""

from ..models import architecture_of
from .plan import Plan

PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def hf_quant_config(plan: Plan) -> dict | None:
    """The content of hf_quant_config.json; None if nothing is quantized."""
    if not plan.form.quantization:
        return None
    quantization = {
        "quant_algo": plan.form.quantization["quant_algo"],
        "kv_cache_quant_algo": plan.kv.algorithm if plan.kv else None,
        **plan.form.quantization,
        "exclude_modules": list(plan.excluded),
    }
    return {"producer": PRODUCER, "quantization": quantization}


def quantization_config(plan: Plan) -> dict | None:
    """The value of `quantization_config` in config.json; None if nothing is quantized."""
    form = plan.form
    if not form.quantization:
        return None
    kv = {"kv_cache_scheme": plan.kv.scheme} if plan.kv else {}
    if form.native is not None:
        return form.native.config | kv | {"modules_to_not_convert": list(plan.excluded)}
    inputs = {"input_activations": form.numbers} if form.activations else {}
    group = inputs | {"weights": form.numbers, "targets": ["Linear"]}
    return {
        **({"config_groups": {"group_0": group}} if form.numbers else {}),
        "ignore": list(plan.excluded),
        **form.quantization,
        **kv,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


def config_json(plan: Plan) -> dict:
    """The original's config with the dtype of what is written, the quantization, and what engines need that transformers leaves out
    when it saves a model (the architecture's `routing`).
    """
    config = {key: value for key, value in plan.config.items() if key != "quantization_config"}
    config |= {key: value for key, value in architecture_of(plan.config).routing.items() if key not in config}
    if "text_config" in config:
        config["text_config"] = _in_bfloat16(config["text_config"])
    quantization = quantization_config(plan)
    return _in_bfloat16(config) | ({"quantization_config": quantization} if quantization else {})


def _in_bfloat16(config: dict) -> dict:
    return config | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}
