"""Weights that Megatron's DDP has not sent to other replicas: `overlap_param_gather` puts it off until the next forward pass."""

from megatron.core.distributed import DistributedDataParallel

from ..common.errors import ExportError
from .model import Model, unwrapping


def finish_gathering(model: Model) -> None:
    """Let DDP send the optimizer's new weights now. Collective over replicas, as in Megatron's own checkpointing.

    Where MXFP8 weights are sent through the memory of the gradients, only the optimizer can put them there; without it, gradients
    would become weights. So `ExportError`, on every rank, unless the caller has sent them.
    """
    for chunk in model if isinstance(model, list) else [model]:
        for wrapper in unwrapping(chunk):
            if not isinstance(wrapper, DistributedDataParallel) or not wrapper.ddp_config.overlap_param_gather:
                continue
            if not wrapper.ddp_config.reuse_grad_buf_for_mxfp8_param_ag:
                wrapper.start_param_sync(force_sync=True)
            elif not all(group.param_gather_dispatched for group in _groups(wrapper)):
                raise ExportError(
                    "the optimizer's new MXFP8 weights are not in the model yet, and travel through the memory of gradients. "
                    "Before the export, call optimizer.prepare_model_params_for_param_sync(), then "
                    "start_param_sync(force_sync=True) of each model chunk"
                )


def _groups(wrapper: DistributedDataParallel) -> list:
    return [*wrapper.bucket_groups, *wrapper.expert_parallel_bucket_groups]
