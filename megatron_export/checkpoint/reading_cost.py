"""What reading a shard from an HF checkpoint takes of a host's memory, by config.json alone."""

from math import prod

from ..common.dtypes import SIZES
from ..common.piece import Axis
from ..models import Source
from ..models.hf_config import text_of
from ..models.layouts import Identity
from .dialects import Dialect, dialect_of


def mapped_bytes(config: dict, source: Source, shard: int) -> int:
    """Bytes of a file's pages that a rank touches when it reads a shard of `shard` bytes."""
    dialect = _dialect_of(config, source)
    turned = source.stack and not (dialect and dialect.powers)  # MXFP4 has the rows of stacks in Megatron's order
    across = Axis.OUT if turned else Axis.IN  # a cut along it takes a part of every row, so it touches all pages
    nbytes = prod(source.shape) * SIZES[source.dtype] if source.cut is across else shard
    if dialect:
        return int(nbytes * dialect.ratio)
    return nbytes * 2 if _in_float32(config) else nbytes


def reading_bytes(config: dict, source: Source, shard: int) -> int:
    """Bytes that a rank copies while it reads a shard of `shard` bytes: it casts or multiplies parts, and joins them."""
    joined = 0 if isinstance(source.layout, Identity) and not source.stack else shard
    if dialect := _dialect_of(config, source):
        return dialect.copied * shard + joined
    return joined + (shard if _in_float32(config) else 0)


def _dialect_of(config: dict, source: Source) -> Dialect | None:
    """The dialect that a parameter is kept in; None for none."""
    dialect = dialect_of(config)
    return dialect if dialect and dialect.holds(source) else None


def _in_float32(config: dict) -> bool:
    text = text_of(config)
    return (text.get("dtype") or text.get("torch_dtype")) == "float32"
