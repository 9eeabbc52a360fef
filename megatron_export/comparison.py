"""The differences of two checkpoints, told: rows of a table, and JSON."""

import math
from dataclasses import asdict
from pathlib import Path

from .differences import Apart, Differences

SHOWN = 10
HEADS = ("weight", "signal to noise", "largest difference")


def rows(found: Differences, one: Path, other: Path) -> list[tuple[str, str]]:
    """The table."""
    other_bytes = [apart for apart in found.apart if not apart.same]
    pairs = [("A", str(one)), ("B", str(other)), ("weights", f"{len(found.apart)} compared, {len(other_bytes)} differ")]
    for name, lines in (
        ("only in A", found.only[0]),
        ("only in B", found.only[1]),
        ("kind", found.kinds),
        ("config", found.configs),
    ):
        pairs += [(name, line) for line in lines[:SHOWN]]
        pairs += [(name, f"... and {len(lines) - SHOWN} more")] if len(lines) > SHOWN else []
    return pairs if found.any else [*pairs, ("same", "nothing differs")]


def lines(found: Differences) -> list[list[str]]:
    """Cells of the weights that are furthest apart."""
    furthest = sorted((apart for apart in found.apart if not apart.same), key=lambda apart: apart.snr)[:SHOWN]
    return [[apart.name, _decibels(apart), f"{apart.largest:.4g}"] for apart in furthest]


def _decibels(apart: Apart) -> str:
    return "other bytes, equal values" if apart.snr == math.inf else f"{apart.snr:.1f} dB"


def as_json(found: Differences) -> dict:
    """The same for machines; infinite decibels are null."""
    return {
        "kind": "megatron_export diff 1",
        "same": not found.any,
        "only_in_a": found.only[0],
        "only_in_b": found.only[1],
        "kinds": found.kinds,
        "configs": found.configs,
        "weights": {
            apart.name: {k: v for k, v in asdict(apart).items() if k != "name"} | {"snr": _finite(apart.snr)}
            for apart in found.apart
        },
    }


def _finite(decibels: float) -> float | None:
    return round(decibels, 3) if math.isfinite(decibels) else None
