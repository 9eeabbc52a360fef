"""The two descriptions of a quantized checkpoint, made from one plan: TensorRT-LLM reads hf_quant_config.json first, vLLM and
SGLang config.json's `quantization_config`. Both name the producer "modelopt", as vLLM refuses any other. FP8_PB in its native
spelling is described in config.json as DeepSeek's own checkpoints are, and MXFP4 of GPT-OSS as OpenAI's, there alone.
"""

from ..engines.quant_configs import MIXED
from ..formats import Form
from ..models import architecture_of
from ..models.statistic_names import experts_module
from .plan import Plan

PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def hf_quant_config(plan: Plan) -> dict | None:
    """The content of hf_quant_config.json; None if nothing is quantized, or in a dialect without that file."""
    if not plan.forms or any(form.native and form.native.alone for form in plan.forms):
        return None
    own = _quantization(plan)
    quantization = {
        "quant_algo": own["quant_algo"],
        "kv_cache_quant_algo": plan.kv.algorithm if plan.kv else None,
        **own,
        "exclude_modules": list(plan.excluded),
    }
    return {"producer": PRODUCER, "quantization": quantization}


def quantization_config(plan: Plan) -> dict | None:
    """The value of `quantization_config` in config.json; None if nothing is quantized."""
    if not plan.forms:
        return None
    kv = {"kv_cache_scheme": plan.kv.scheme} if plan.kv else {}
    native = plan.forms[0].native if len(plan.forms) == 1 else None
    if native is not None:
        left = plan.excluded if native.excluded is None else native.excluded
        return native.config | kv | {"modules_to_not_convert": list(left)}
    quantization = _quantization(plan)
    groups = _groups(plan.forms, quantization.get("quantized_layers", {}))
    return {
        **({"config_groups": groups} if groups else {}),
        "ignore": list(plan.excluded),
        **quantization,
        **kv,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


def _quantization(plan: Plan) -> dict:
    """`quant_algo` and what stands beside it: that of the one format, or that of every module. Experts that are written one by one
    have the name of the module that holds those of a layer, as engines ask for it.
    """
    if len(plan.forms) == 1:
        return plan.forms[0].quantization
    layers: dict[str, dict] = {}
    architecture = architecture_of(plan.config)
    for module, form in plan.layers.items():
        if ".experts." not in module:
            layers[module] = form.quantization
        elif (experts := experts_module(module)) not in layers:
            names = (name for name in architecture.names(experts) if "*" not in name)
            layers |= dict.fromkeys(names, form.quantization)
    return {"quant_algo": MIXED, "quantized_layers": layers}


def _groups(forms: tuple[Form, ...], layers: dict[str, dict]) -> dict[str, dict]:
    """How config.json describes the numbers of each format, for the modules that have it; `layers` is empty for one format."""
    found = {}
    for form in forms:
        if form.numbers:
            mine = sorted(module for module, one in layers.items() if one is form.quantization)
            inputs = {"input_activations": form.numbers} if form.activations else {}
            found[f"group_{len(found)}"] = inputs | {"weights": form.numbers, "targets": mine or ["Linear"]}
    return found


def config_json(plan: Plan) -> dict:
    """The original's config with the dtype of what is written, the quantization, and what engines need that transformers leaves out
    or spells otherwise when it saves a model (the architecture's `routing` and `respelled`).
    """
    config = {key: value for key, value in plan.config.items() if key != "quantization_config"}
    inner = _in_bfloat16(config["text_config"]) if "text_config" in config else {}
    architecture = architecture_of(plan.config)
    routing = {key: value for key, value in architecture.routing.items() if (config | inner).get(key) is None}
    config |= {"text_config": inner | routing} if inner else routing
    for key, said in architecture.respelled(plan.config).items():
        config[key] = config[key] | said if isinstance(said, dict) else said
    quantization = quantization_config(plan)
    return _in_bfloat16(config) | ({"quantization_config": quantization} if quantization else {})


def _in_bfloat16(config: dict) -> dict:
    return config | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}
