"""The front matter of the model card, which the Hub reads; its text stands in templates/README.md."""

import re

from huggingface_hub import ModelCardData

from .facts import Account
from .render import rendered

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def text(run: Account) -> str:
    """The whole card."""
    return rendered("README.md", run=run, front=_front(run))


def _front(run: Account) -> str:
    forms = run.plan.forms
    kinds = [*dict.fromkeys(f"{form.bits}-bit" for form in forms), *dict.fromkeys(form.name for form in forms)]
    tags = ["megatron-core", "modelopt", "quantized", *kinds] if forms else ["megatron-core", "safetensors"]
    own = len(forms) == 1 and forms[0].native  # a layout that transformers reads
    library = "transformers" if own or not forms else "Model Optimizer"
    base = run.origin if _HUB_ID.fullmatch(run.origin) else None
    keys = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "license": run.license or None,
        "library_name": library,
        "pipeline_tag": "image-text-to-text" if run.plan.copied else "text-generation",
        "tags": [*tags, *(["kv-cache-" + run.plan.kv.name] if run.plan.kv else [])],
    }
    return ModelCardData(**keys).to_yaml(original_order=list(keys))
