"""Layouts: `join` undoes `split` at every cut, shards hold the rows that `source` names, and rows land where HF has them."""

import pytest
import torch
from torch import Tensor

from megatron_export.models.layouts import QKV, Copies, Fused, Identity, Layout, Split, Vocab
from megatron_export.models.part_layouts import ByPart
from megatron_export.models.segment_layouts import Heads, OneMore, Segments

LAYOUTS = {
    "identity": (Identity(), 48),
    "split": (Split(("gate", "up")), 48),
    "qkv": (QKV(2, 3), 48),
    "gated": (QKV(2, 3, gated=True), 72),
    "segments": (Segments((8, 16, 4), (1, 1, 1), ("z", "x", "dt")), 28),
    "heads": (Heads((2, 2, 3)), 28),
}


def shards_of(layout: Layout, whole: Tensor, count: int) -> list[Tensor]:
    """What Megatron's ranks hold: plain rows, but for gate over up, of which every rank holds its rows of each."""
    if isinstance(layout, Split):
        parts = [part.chunk(count) for part in whole.chunk(len(layout.parts))]
    elif isinstance(layout, Segments | Heads):
        sizes = layout.sizes if isinstance(layout, Segments) else [4 * width for width in layout.widths]
        parts = [part.chunk(count) for part in whole.split(sizes)]
    else:
        return list(whole.chunk(count))
    return [torch.cat([part[index] for part in parts]) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("columns", [(), (5,)])
def test_shards_split_into_the_rows_that_source_names_and_join_again(name: str, count: int, columns: tuple) -> None:
    layout, rows = LAYOUTS[name]
    whole = torch.arange(rows * (columns[0] if columns else 1)).reshape(rows, *columns)
    parts = layout.split(whole, 0, 1)
    assert torch.equal(layout.join(parts, rows), whole)
    for index, shard in enumerate(shards_of(layout, whole, count)):
        held = layout.split(shard, index, count)
        for part, tensor in held.items():
            assert torch.equal(tensor, parts[part][layout.source(parts[part].shape[0], index, count, shard.shape[0])])
        assert torch.equal(layout.join(held, shard.shape[0]), shard)
        assert torch.equal(torch.cat([whole[cut] for cut in layout.rows(rows, index, count, shard.shape[0])]), shard)


EVERY = {
    **LAYOUTS,
    "copies": (Copies(("", "a")), 48),
    "one more": (OneMore(), 48),
    "fused": (Fused(Split(("gate", "up")), (24, 24)), 48),
    "two segments in a part": (Segments((8, 16, 4), (2, 1), ("zx", "dt")), 28),
}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", EVERY)
def test_the_rows_of_parts_are_as_many_as_split_gives(name: str, count: int) -> None:
    layout, rows = EVERY[name]
    for index, shard in enumerate(shards_of(layout, torch.arange(rows), count)):
        if count > 1 and not layout.splits(len(shard)):
            continue
        assert layout.part_rows(len(shard), index, count) == {
            part: len(tensor) for part, tensor in layout.split(shard, index, count).items()
        }


@pytest.mark.parametrize("whole", [Split(("gate", "up")), QKV(2, 3)])
def test_so_they_are_where_parts_are_cut_by_themselves_or_rows_are_padded(whole: Layout) -> None:
    by_part, padded = ByPart(whole, 48), Vocab(21, ("", "copy"))
    for index in range(4):
        shard = torch.zeros(by_part.shard_rows(4), 2)
        found = {part: len(tensor) for part, tensor in by_part.split(shard, index, 4).items()}
        assert by_part.part_rows(len(shard), index, 4) == found
        assert padded.part_rows(6, index, 4) == dict.fromkeys(("", "copy"), 3 if index == 3 else 6)


def test_a_gate_lies_behind_its_own_query_in_hf_and_behind_all_queries_of_its_group_in_megatron() -> None:
    rows = torch.tensor([10, 11, 50, 51, 20, 30, 12, 13, 52, 53, 21, 31])  # two groups of two queries, one row a head
    layout = QKV(2, 1, gated=True)
    parts = layout.split(rows, 0, 1)
    found = {part: tensor.tolist() for part, tensor in parts.items()}
    assert found == {"q": [10, 50, 11, 51, 12, 52, 13, 53], "k": [20, 21], "v": [30, 31]}
    assert layout.splits(6) and not layout.splits(4)


def test_a_part_of_several_segments_is_taken_apart_where_all_of_it_is() -> None:
    layout, whole = Segments((4, 4, 8), (2, 1), ("qk", "v")), torch.arange(32).reshape(16, 2)
    shards = shards_of(layout, whole, 2)
    assert layout.splits(16) and not layout.splits(8)
    assert torch.equal(layout.gathered(torch.cat(shards), 2), whole)
    assert [part.tolist() for part in layout.split(whole, 0, 1).values()] == [whole[:8].tolist(), whole[8:].tolist()]


def test_hf_has_all_segments_of_a_head_together() -> None:
    rows = torch.tensor([10, 11, 20, 21, 30, 31, 32, 33])  # two heads of one, one and two rows
    assert Heads((1, 1, 2)).split(rows, 0, 1)[""].tolist() == [10, 20, 30, 31, 11, 21, 32, 33]


def test_qkv_rows_are_queries_key_value_of_one_group_after_another() -> None:
    rows = torch.tensor([10, 11, 20, 30, 12, 13, 21, 31])  # two groups of two queries, one row a head
    parts = QKV(2, 1).split(rows, 0, 1)
    found = {part: tensor.tolist() for part, tensor in parts.items()}
    assert found == {"q": [10, 11, 12, 13], "k": [20, 21], "v": [30, 31]}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["split", "qkv"])
def test_one_tensor_of_all_parts_has_them_one_after_the_other(name: str, count: int) -> None:
    """Shards that lie one after the other make the whole, each has the rows that `rows` names, and only the whole is split."""
    inner, rows = LAYOUTS[name]
    whole = torch.arange(rows * 5).reshape(rows, 5)
    parts = inner.split(whole, 0, 1)
    layout = Fused(inner, tuple(part.shape[0] for part in parts.values()))
    shards = shards_of(inner, whole, count)
    assert torch.equal(layout.gathered(torch.cat(shards), count), whole)
    assert torch.equal(layout.split(whole, 0, 1)[""], torch.cat(list(parts.values())))
    assert torch.equal(layout.join(layout.split(whole, 0, 1), rows), whole)
    for index, shard in enumerate(shards):
        mine = layout.rows(rows, index, count, shard.shape[0])
        assert torch.equal(torch.cat([whole[cut] for cut in mine]), shard)
        assert layout.splits(shard.shape[0]) is (count == 1)


def test_queries_of_a_group_share_their_mean_and_v_has_the_rows_of_the_first() -> None:
    """Two groups of three queries, two rows a head: the mean of 1, 3 and 8 is 4, and not 8."""
    rows = torch.tensor([1.0, 10.0, 3.0, 20.0, 8.0, 60.0, 0.0, -1.0, 0.0, -2.0, 6.0, -3.0])
    layout = QKV(3, 2)
    assert layout.same_in_group(rows).tolist() == [4.0, 30.0] * 3 + [2.0, -2.0] * 3
    assert layout.first_queries(rows).tolist() == [1.0, 10.0, 0.0, -1.0]


@pytest.mark.parametrize(("vocab", "held"), [(10, [4, 4, 2, 0]), (16, [4, 4, 4, 4]), (3, [3, 0, 0, 0])])
def test_padded_vocabulary_rows_belong_to_no_shard(vocab: int, held: list[int]) -> None:
    layout, padded = Vocab(vocab), torch.arange(32).reshape(16, 2)
    parts = [layout.split(shard, index, 4)[""] for index, shard in enumerate(padded.chunk(4))]
    assert [part.shape[0] for part in parts] == held
    assert torch.equal(torch.cat(parts), padded[:vocab])
    for index, part in enumerate(parts):
        assert torch.equal(part, padded[:vocab][layout.source(vocab, index, 4, 4)])
        assert torch.equal(layout.join({"": part}, 4)[: part.shape[0]], part)
        assert not layout.join({"": part}, 4)[part.shape[0] :].any()
