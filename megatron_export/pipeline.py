"""The whole story of an export on one page: plan, agree on maxima, then encode, gather and write bucket by bucket."""

import resource
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import assets, gather, topology
from .contradictions import contradictions
from .errors import ExportError, report
from .formats import Options
from .gather import together
from .item import Item, Measured
from .measured import check_calibration, measured
from .model import finish_gathering, shards_of
from .names import copied_prefixes, is_expert, is_mtp, settings_of, unscaled_rope_settings, without_mtp
from .piece import Piece
from .plan import Plan, make_plan
from .progress import Progress, quiet
from .quant_config import config_json, hf_quant_config
from .sizes import parse_size
from .source import SourceWeights, copied_tensors
from .topology import Topology
from .writer import CheckpointWriter, check_apart, check_target


@dataclass(frozen=True)
class Report:
    """What an export did. Sizes in bytes; peaks are one number per rank, GPU peaks 0 on the CPU."""

    folder: Path
    plan: Plan
    seconds: float
    peak_host: tuple[int, ...]
    peak_gpu: tuple[int, ...]


def export_hf_checkpoint(
    model: nn.Module | list[nn.Module],
    export_dir: str | Path,
    *,
    hf_model: str | Path,
    format: str = "fp8",
    calibration: dict[str, Tensor] | None = None,
    kv_cache: str = "none",
    group_size: int = 128,
    fp8_pb_spelling: str = "native",
    awq_output: str = "folded",
    awq_clip: bool = False,
    exclude: Iterable[str] = (),
    mtp: str = "keep",
    quantize_mla: bool = False,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Report:
    """Write a live Megatron-Core model as a unified HuggingFace checkpoint; the model is left exactly as it was.

    model           this rank's `GPTModel`, or its list of virtual-pipeline chunks, wrapped in DDP or Float16Module or
                    not; quantized as the bfloat16 of its weights
    hf_model        folder or hub id of the original HF model: config and tokenizer, and the tensors that Megatron's model
                    does not have (the parts of Llama 4 that see); its other weights are not read
    format          bf16, fp8, fp8_pb, nvfp4, nvfp4_awq, int4_awq or w4a8_awq; kv_cache: none, fp8 or nvfp4
    calibration     what `calibrate` returned; every format but bf16 and fp8_pb needs it, and every KV cache
    group_size      128 or 64, for int4_awq and w4a8_awq
    fp8_pb_spelling native or modelopt; awq_output: folded or modelopt, for nvfp4_awq
    awq_clip        apply the clipping that `calibrate(awq_clip=True)` found, for the AWQ formats
    exclude         globs over HF module names to leave in bfloat16
    mtp             keep or drop layers that predict one more token (DeepSeek)
    quantize_mla    quantize latent attention (DeepSeek) too, in formats that not every engine loads it in
    max_shard_size  largest shard, as bytes or like "5GB"
    Collective: every rank of the world calls it with the same arguments. `ExportError` on every rank, with the same
    message, when it cannot be done; then nothing was published and `export_dir` is as it was.
    """
    started = time.monotonic()
    export_dir = Path(export_dir).resolve()
    with topology.current() as here:
        with together(here, "read the model's shapes"):
            folder = assets.find_model(hf_model, weights=False)
            if mtp not in ("keep", "drop"):
                raise ExportError(f"mtp must be 'keep' or 'drop', not {mtp!r}")
            config = assets.read_config(folder)
            folder = assets.with_copied(folder, hf_model, copied_prefixes(config))
            copied = copied_tensors(folder, copied_prefixes(config))
            config = without_mtp(config) if mtp == "drop" else config
            report(contradictions(model, settings_of(config), unscaled_rope_settings(config)))
            shards = shards_of(model)
            if mtp == "drop":
                shards = {name: shard for name, shard in shards.items() if not is_mtp(name, config)}
        finish_gathering(model)
        held = gather.locate(here, shards)
        with together(here, "plan the export"):
            plan = make_plan(
                config,
                held,
                format=format,
                options=Options(group_size, fp8_pb_spelling, awq_output, awq_clip),
                kv_cache=kv_cache,
                exclude=exclude,
                quantize_mla=quantize_mla,
                max_shard_bytes=parse_size(max_shard_size),
                copied=copied,
            )
            check_calibration(plan, calibration)
            if here.first:
                check_target(export_dir, plan, overwrite=overwrite)
                check_apart(export_dir, folder)
        amaxes = _amaxes(here, plan, shards, calibration or {})
        _write(here, plan, shards, amaxes, calibration or {}, export_dir, overwrite, folder, progress)
        peak_host, peak_gpu = zip(*gather.everyone(here, _peaks(here)), strict=True)
    return Report(export_dir, plan, time.monotonic() - started, peak_host, peak_gpu)


def _amaxes(here: Topology, plan: Plan, shards: dict[str, Tensor], calibration: dict[str, Tensor]) -> dict[str, Tensor]:
    """The amax of each weight that this rank quantizes, smoothed, agreed over the ranks that share it: float32 [].

    One pass over this rank's weights, which also refuses NaN and Inf in any of them. Weights are rounded to bfloat16
    before they are quantized, so their maxima are too.
    """
    mine = [item for item in plan.items if here.rank in item.ranks]
    with together(here, "read the weights"):
        largest = [_largest(here, item, shards[item.source.canonical], calibration) for item in mine]
        values = torch.stack(largest) if largest else torch.zeros(0, device=here.device)
        report(
            [
                f"NaN or Inf in {', '.join(item.source.names().values())}"
                for item, finite in zip(mine, values.isfinite().tolist(), strict=True)
                if not finite
            ]
        )
    amaxes = {}
    for expert in (False, True):  # whose shards are on other ranks
        cut = [n for n, i in enumerate(mine) if i.form and i.source.cut and is_expert(i.source.canonical) is expert]
        agreed = gather.maximum(values[cut], here.cut(expert).group)
        amaxes |= {mine[number].source.canonical: amax for number, amax in zip(cut, agreed, strict=True)}
    for item, amax in zip(mine, values, strict=True):
        if item.form and item.source.cut is None:
            amaxes[item.source.canonical] = amax
    ratios = {item.source.canonical: calibration[item.smoothed.ratio] for item in plan.items if item.smoothed.ratio}
    for fused in plan.fused:
        for shared in (amaxes, ratios):
            if present := [shared[name] for name in fused if name in shared]:
                shared |= dict.fromkeys(fused, torch.stack(present).amax())
    # experts with one scale are on several ranks, all of which have some of each of their stage's layers
    pooled = [fused for fused in plan.fused if is_expert(fused[0]) and fused[0] in amaxes]
    agreed = gather.maximum(torch.stack([amaxes[fused[0]] for fused in pooled]), here.dispatch.group) if pooled else ()
    for fused, amax in zip(pooled, agreed, strict=True):
        amaxes |= dict.fromkeys(fused, amax)
    for name in amaxes.keys() & ratios.keys():
        amaxes[name] = amaxes[name] * ratios[name].to(here.device)
    return amaxes


def _largest(here: Topology, item: Item, shard: Tensor, calibration: dict[str, Tensor]) -> Tensor:
    index = item.ranks.index(here.rank)
    if item.smoothed.vectors:
        parts = item.split(shard, index, measured(item, calibration, here.device)).values()
        return torch.stack([_amax(part.data) for part in parts]).amax()
    return _amax(item.source.layout.split(shard, index, len(item.ranks))[""] if item.source.padded else shard)


def _amax(values: Tensor) -> Tensor:
    """The largest magnitude as bfloat16 holds it, float32 []; NaN or Inf stay visible."""
    if values.numel() == 0:
        return torch.zeros((), device=values.device)
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high).to(torch.bfloat16).float()


def _write(
    here: Topology,
    plan: Plan,
    shards: dict[str, Tensor],
    amaxes: dict[str, Tensor],
    calibration: dict[str, Tensor],
    export_dir: Path,
    overwrite: bool,
    source: Path,
    progress: Progress,
) -> None:
    """Encode, gather and write one bucket after the other; memory is bounded by a bucket, whatever the model."""
    with ExitStack() as stack:
        with together(here, "start writing"):
            writer = (
                stack.enter_context(CheckpointWriter(export_dir, plan, overwrite=overwrite)) if here.first else None
            )
        for bucket in progress("export", plan.buckets):
            numbers, parts = _parts(here, bucket, shards, calibration)
            with together(here, "quantize"):
                encoded = {
                    name: item.encode(parts[name], item.ranks.index(here.rank), amaxes.get(name), numbers[name])
                    for item in bucket
                    if (name := item.source.canonical) in parts
                }
                parcel = gather.parcel_to_writer(here, bucket, encoded)
            gather.deliver(here, parcel)
            with together(here, "write"):
                if writer:
                    writer.write(gather.open_at_writer(bucket, parcel))
        with together(here, "copy what stays as it is"):
            if writer and plan.copied:
                with SourceWeights(source, only=copied_prefixes(plan.config)) as weights:
                    writer.write((output, weights.whole(output.name)) for output in plan.copied)
        with together(here, "publish"):
            if writer:
                quant = hf_quant_config(plan)
                jsons = {"config.json": config_json(plan)} | ({"hf_quant_config.json": quant} if quant else {})
                writer.publish(jsons, assets.files_to_copy(source))


def _parts(
    here: Topology, bucket: tuple[Item, ...], shards: dict[str, Tensor], calibration: dict[str, Tensor]
) -> tuple[dict[str, Measured], dict[str, dict[str, Piece]]]:
    """What this rank is to encode, smoothed and in bfloat16, by canonical name, and the numbers that belong to it: its
    shards, or whole what is gathered first.
    """
    first = [item for item in bucket if item.gather_first]
    mine = {item.source.canonical: item for item in bucket if here.rank in item.ranks}
    with together(here, "split its shards"):
        numbers = {name: measured(item, calibration, here.device) for name, item in mine.items()}
        parts = {
            name: item.split(shards[name], item.ranks.index(here.rank), numbers[name]) for name, item in mine.items()
        }
        parcels = {name: gather.parcel_to_first(here, i, parts[name]) for name, i in mine.items() if i.gather_first}
    for parcel in parcels.values():
        gather.deliver(here, parcel)
    if first:
        with together(here, "join shards"):
            whole = {name: gather.open_first(here, mine[name], parcel) for name, parcel in parcels.items()}
            parts = {name: found for name, found in (parts | whole).items() if found is not None}
    return numbers, parts


def _peaks(here: Topology) -> tuple[int, int]:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host, torch.cuda.max_memory_allocated(here.device) if here.device.type == "cuda" else 0
