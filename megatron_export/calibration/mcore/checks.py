"""What is refused before a Megatron model is run: data that does not fit it, and models that cannot be measured as they are."""

from torch import Tensor, nn

from ...common.errors import ExportError
from ...distributed.collectives import everyone
from ...distributed.topology import Topology
from ...mcore.addons import adapters_of, is_quantized
from ...mcore.model import Model, chunks_of, linears_of, shards_of, weights_of
from ...models import pooled
from ..checks import LATENT, QUANTIZED


def check_parallelism(chunk: nn.Module, batches: list[Tensor], here: Topology) -> None:
    """`ExportError` under context parallelism, in FP8 or FP4, and where sequence parallelism does not divide the samples."""
    if here.cp_size > 1:
        raise ExportError(
            f"the ranks share each sample (context parallelism, {here.cp_size}), so no rank sees whole ones, which means and "
            "searches are of: calibrate the same weights in a run without it, keep what it measures with save_calibration, and "
            "give load_calibration's result to the export here"
        )
    if chunk.config.fp8 or getattr(chunk.config, "fp4", None):
        raise ExportError(
            "the model computes in FP8 or FP4: calibrate it in bfloat16, as it will be quantized from that"
        )
    lengths = {batch.shape[-1] for batch in batches}
    if chunk.config.sequence_parallel and any(length % here.tp_size for length in lengths):
        raise ExportError(
            f"sequence parallelism cuts samples of {sorted(lengths)} tokens in {here.tp_size}: give a length that divides"
        )


def check_modules(here: Topology, model: Model, searched: bool) -> None:
    """`ExportError` for weights that cannot be read or observed, for quantizers, and for adapters if AWQ searches (`searched`)."""
    weights = weights_of(model)
    shards_of(model).readable(here.device)
    for _ in weights.values():  # each is read once where all ranks hear of a failure
        pass
    if is_quantized(model):
        raise ExportError(QUANTIZED)
    if searched and chunks_of(model)[0].config.moe_latent_size:
        raise ExportError(LATENT)
    if searched and (adapted := adapters_of(model)):
        raise ExportError(
            f"{next(iter(adapted))} (of {len(adapted)} such) has an adapter, without which AWQ would search its weight. Merge "
            "the adapters into the model first"
        )
    called = {pooled(name) for name in linears_of(model)}
    if unseen := sorted({pooled(name) for name in weights} - called):
        raise ExportError(
            f"{unseen[0]} (of {len(unseen)} such) is in a module that multiplies the experts of a layer at once, without "
            "Transformer Engine: calibrate a model with SequentialMLP or TEGroupedMLP, save the statistics, and load them"
        )


def check_replicas(here: Topology, model: Model, batches: list[Tensor]) -> None:
    """`ExportError` on every rank if replicas that exchange the tokens of experts have batches of other shapes. Collective."""
    config = chunks_of(model)[0].config
    if config.num_moe_experts is None or here.dispatch.size <= here.tp_size:
        return
    shapes = everyone(here, [tuple(batch.shape) for batch in batches])
    if any(other != shapes[0] for other in shapes):
        raise ExportError(
            f"the experts of a layer are spread over data-parallel replicas, so all need batches of the same shapes; they "
            f"have {sorted({len(found) for found in shapes})} batches of {sorted(set().union(*shapes))}. Give all as many"
        )
