"""Lets Megatron's schedules run a backward pass that changes nothing: no parameter asks for a gradient, nobody gathers any."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .model import Model, chunks_of

# Without a training step's settings the loss is that of all tokens, undivided, and schedules call nobody about gradients. Between
# two interleaved stages, a batch of messages both ways would mix up activations and gradients.
_SETTINGS = {"calculate_per_token_loss": True, "batch_p2p_comm": False} | dict.fromkeys(
    ("finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func")
)


@contextmanager
def only_activations(model: Model) -> Iterator[None]:
    """While open, gradients are on, for activations alone; afterwards settings and parameters are as they were."""
    chunks = chunks_of(model)
    configs = list({id(chunk.config): chunk.config for chunk in chunks}.values())
    before = [{name: getattr(config, name) for name in _SETTINGS} for config in configs]
    asking = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
    try:
        for config in configs:
            vars(config).update(_SETTINGS)
        for parameter in asking:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for config, settings in zip(configs, before, strict=True):
            vars(config).update(settings)
        for parameter in asking:
            parameter.requires_grad_(True)
