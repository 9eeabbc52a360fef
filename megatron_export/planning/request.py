"""What an export is asked for, as far as a model that ModelOpt quantized may say it itself; and the plan of that."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..cli.config import ExportConfig
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


def asked_by(config: ExportConfig) -> Asked:
    """What the command was asked for; of statistics, only whether a file of them was given."""
    return Asked(
        config.format,
        config.kv_cache,
        Options(config.group_size, config.fp8_pb_spelling, config.awq_output, config.awq_clip),
        {} if config.load_calibration else None,
        config.exclude,
        config.quantize_mla,
    )
