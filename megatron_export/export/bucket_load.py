"""What a bucket takes of a rank's memory, and of the way between ranks: from a plan alone, for its forecast.

The stages that take it are in encode_stream.py and transport.py.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from ..common.piece import Axis
from ..formats import encode_bytes
from ..planning.parameter import Item
from ..planning.tensor_spec import Output

ALIGNMENT = 16  # of tensors in a message


class Load(NamedTuple):
    """Memory that a bucket takes on a rank, in bytes; of `splitting`, `encoding` and `opening`, which pass, the most at a time.

    moved, arrived   of what is gathered first: the shards that this rank sends to the first rank, and on that those of all ranks
    copied           what splitting copied, and what was made whole
    encoded, sent    the pieces, and the message for the writer
    parcel, opening  when all has travelled: the message, on the writer those of others and its own pieces; and what taking them
                     copies
    """

    moved: int = 0
    arrived: int = 0
    copied: int = 0
    splitting: int = 0
    encoded: int = 0
    encoding: int = 0
    sent: int = 0
    parcel: int = 0
    opening: int = 0

    def plus(self, other: "Load", times: int) -> "Load":
        """With so many others like `other`."""
        return Load(
            self.moved + times * other.moved,
            self.arrived + times * other.arrived,
            self.copied + times * other.copied,
            max(self.splitting, other.splitting),
            self.encoded + times * other.encoded,
            max(self.encoding, other.encoding),
            self.sent + times * other.sent,
            self.parcel + times * other.parcel,
            self.opening + times * other.opening,
        )


def load_of(item: Item, index: int, device: str, streamed: bool) -> Load:
    """What shard `index` of an item takes on its rank; `device` is "cpu" or "cuda". If `streamed`, the shard itself counts too."""
    raw, sent = size_of(item.raw_message(index)), size_of(item.message(index))
    interleaved = not item.source.layout.views and len(item.shard_shape) == 2
    smoothed = bool(item.smoothed.columns or item.smoothed.rows)
    copies = smoothed or (interleaved and item.splits)
    copied, arrived = raw if copies or streamed else 0, 0
    parts = item.parts if item.gather_first else item.raw_message(index)
    largest = max((part.shape for part in parts), key=prod)
    splitting = 8 * prod(largest) * smoothed + raw * (copies and streamed)  # twice in float32
    if item.gather_first and index:
        return Load(moved=raw, copied=copied, splitting=splitting)
    if item.gather_first:
        arrived = sum(size_of(item.raw_message(other)) for other in range(len(item.ranks)))
        copied = sum(part.nbytes for part in item.parts)
        splitting += copied if len(item.shard_shape) > 1 and not item.splits else 0
    encoded, encoding = (sent, encode_bytes(item.form, largest, device)) if item.form else (0, 0)
    return Load(0, arrived, copied, splitting, encoded, encoding, sent, sent)


def peak(old: Load, new: Load) -> int:
    """The most memory that a rank has at a time, in bytes, while bucket `old` is taken and `new` is encoded and delivered."""
    return max(
        old.copied + old.parcel + new.moved + new.arrived + new.copied + new.splitting,
        old.parcel + new.copied + new.encoded + max(new.encoding, new.sent),
        old.parcel + new.sent + new.parcel + new.opening,
    )


def padded(nbytes: int) -> int:
    """Bytes of a tensor in a message, after which the next one is aligned for any dtype."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def size_of(message: Sequence[Output]) -> int:
    """Bytes of a message."""
    return sum(padded(output.nbytes) for output in message)


def opening_bytes(item: Item) -> int:
    """Memory that `transport.open_at_writer` takes of an item beside its messages: shards are joined, dims of
    stacks are swapped.
    """
    by_rank = item.gather_first or (item.rows and item.source.cut is Axis.OUT)  # nothing is to be joined
    return item.nbytes * ((len(item.ranks) > 1 and not by_rank) + item.stacked)
