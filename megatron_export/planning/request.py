"""What an export is asked for, as far as a model that ModelOpt quantized may say it itself; and the plan of that."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.text import parse_size
from ..formats import Options
from .plan import Held, Plan, make_plan


@dataclass(frozen=True)
class Asked:
    """What an export was asked for. None: whatever the model's quantizers say; without any, fp8 and no cache.

    `inherited`: they have said it, and the statistics are theirs.
    """

    format: str | None
    kv_cache: str | None
    options: Options
    calibration: dict[str, Tensor] | None
    exclude: tuple[str, ...]
    quantize_mla: bool
    smoothed: bool = False
    inherited: bool = False

    def plain(self) -> "Asked":
        """Of a model without quantizers."""
        return replace(self, format=self.format or "fp8", kv_cache=self.kv_cache or "none")

    def plan(self, config: dict, held: dict[str, Held], max_shard_size: str | int, **more: Any) -> Plan:
        """The plan of it, for a model of config.json's dict that is where `held` says; `more` is passed on to `make_plan`."""
        return make_plan(
            config,
            held,
            format=self.format,
            options=self.options,
            kv_cache=self.kv_cache,
            exclude=self.exclude,
            quantize_mla=self.quantize_mla,
            smoothed=self.smoothed,
            max_shard_bytes=parse_size(max_shard_size),
            **more,
        )


@dataclass(frozen=True)
class Request:
    """What is asked of an export; `export_hf_checkpoint` says what each field means."""

    hf_model: str | Path
    format: str | None = None
    calibration: dict[str, Tensor] | None = None
    kv_cache: str | None = None
    options: Options = Options()
    exclude: tuple[str, ...] = ()
    mtp: str = "keep"
    quantize_mla: bool = False
    max_shard_size: str | int = "5GB"
    writers: str = "rank0"
    bucket_bytes: int | None = None
    merge_lora: bool = False


def requested(settings: dict[str, Any], **more: Any) -> Request:
    """The request that arguments of `export_hf_checkpoint` make."""
    options = {name: value for name, value in settings.items() if name in Options.__dataclass_fields__}
    rest = {name: value for name, value in settings.items() if name not in options}
    return Request(**rest, options=Options(**options), **more)
