"""An AWQ search holds one linear at a time, whatever the number of layers: counted by CUDA's allocator."""

import gc
import os
from unittest import mock

import pytest
import torch

from megatron_export import calibrate
from megatron_export.formats import awq_gram
from megatron_export.mcore import parallel_state
from megatron_export.mcore.build import build_model

from ..support.models import EXAMPLE, read_json
from ..support.ranks import free_port

CONFIG = read_json(EXAMPLE / "config.json") | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
SEARCHES = 3  # of a linear at most: int4_g128, nvfp4, nvfp4_shared
CHANNELS = 512 + 512 + 512 + 2048  # inputs of a layer's linears


def peak_of_search(layers: int) -> int:
    """Bytes of GPU memory above the model's during a search with clipping."""
    port = str(free_port())
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with (
        mock.patch.dict(os.environ, ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}),
        parallel_state.started(1, 1, "cuda"),
    ):
        with parallel_state.current() as here:
            torch.manual_seed(0)
            config = CONFIG | {"num_hidden_layers": layers}
            model = build_model(config, here, max_sequence_length=64, initialize=True)
        gc.collect()  # what is of an earlier test, or of another model
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        calibrate(model, torch.arange(512).view(8, 64).split(2), format=("nvfp4_awq", "int4_awq"))
        return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("squares", [False, True])
def test_15_layers_take_what_3_take_and_the_factors_of_their_alphas(
    squares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 layers weigh 84 MB. Of each input channel stay eleven factors, a maximum and a mean: 60 bytes a search."""
    monkeypatch.setattr(awq_gram, "pays", lambda *sizes: squares)
    few, many = peak_of_search(3), peak_of_search(15)
    assert many < few + 12 * CHANNELS * 60 * SEARCHES + (1 << 20), (few, many)
