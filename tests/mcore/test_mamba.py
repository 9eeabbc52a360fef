"""Mamba in plain torch: its recurrence."""

import torch

from megatron_export.mcore.mamba import CHUNK, scan


def test_chunks_of_the_scan_are_the_recurrence() -> None:
    """Token by token, in float64: differences are of float32 alone."""
    torch.manual_seed(0)
    tokens, heads, groups, width, size = 2 * CHUNK + 5, 4, 2, 3, 6
    values, steps = torch.randn(2, tokens, heads, width), torch.rand(2, tokens, heads)
    decay, keys, queries = -torch.rand(heads) * 3, *torch.randn(2, 2, tokens, groups, size)
    state, expected = torch.zeros(2, heads, width, size, dtype=torch.float64), []
    for t in range(tokens):
        d = steps[:, t].double()
        b, c = (each[:, t].double().repeat_interleave(heads // groups, dim=1) for each in (keys, queries))
        state = state * (d * decay).exp()[..., None, None]
        state = state + (d[..., None] * values[:, t].double())[..., None] * b[..., None, :]
        expected.append((state * c[..., None, :]).sum(-1))
    found = scan(values, steps, decay, keys, queries)
    torch.testing.assert_close(found.double(), torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5)
