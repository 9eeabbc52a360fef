"""Memory of an export is bounded by its buckets: it does not grow with the number of layers, on any rank.

What is measured is the resident memory of a whole process, as Linux keeps its peak, from the call of the export on; Python,
torch and Megatron (0.4 GB) are part of it. On the CPU a rank's weights are too, while in use they are on a GPU: so the bytes of
its parameters are subtracted, and nothing else. The encoded tensors, which a GPU would hold as well, stay counted. glibc is told to
give back what is freed, as MALLOC_MMAP_THRESHOLD_=1048576 does: what it keeps beyond that differs from run to run.
"""

import ctypes
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_export import export_hf_checkpoint
from megatron_export.mcore import parallel_state
from megatron_export.mcore.build import build_model
from megatron_export.mcore.model import chunks_of
from megatron_export.models import parameters_of
from megatron_export.planning import shard_files

from ..support.live import blank
from ..support.models import EXAMPLE, read_json
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

BUCKET = 4 << 20
M_MMAP_THRESHOLD = -3  # of malloc.h
CONFIG = read_json(EXAMPLE / "config.json") | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}


def measure() -> int:
    """Bytes resident now, above which the peak is told from here on."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    return resident("VmRSS")


def resident(key: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most since they were measured (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def ones_of(config: dict) -> dict[str, torch.Tensor]:
    """Statistics of which each is 1."""
    linears = [name.removesuffix("weight") for name in parameters_of(config) if "linear" in name]
    return {f"{name}input_amax": torch.tensor(1.0) for name in linears}


def peak_of_export(folder: Path, layers: int) -> int:
    """Bytes by which this rank's memory rose above the loaded model's during an nvfp4 export at TP=2."""
    config = CONFIG | {"num_hidden_layers": layers}
    statistics = ones_of(config)
    with (
        blank(config, tp=2) as (model, _),
        mock.patch.object(shard_files, "BUCKET_BYTES", BUCKET),
        mock.patch("megatron_export.checkpoint.original.read_config", lambda *_, **__: config),
    ):
        before = measure()
        export_hf_checkpoint(model, folder, hf_model=EXAMPLE, format="nvfp4", calibration=statistics)
        return resident("VmHWM") - before


SHARD = 100_000_000
LARGE = CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}


def peak_beside_weights(folder: Path, layers: int) -> tuple[int, int]:
    """Bytes of this rank's weights, and of its peak beside them during an fp8 export at TP=2."""
    config = LARGE | {"num_hidden_layers": layers}
    statistics = ones_of(config)
    with parallel_state.started(2, 1, "cpu"):
        with parallel_state.current() as here:
            model = build_model(config, here, max_sequence_length=1)
        weights = [parameter.data.fill_(0.02) for chunk in chunks_of(model) for parameter in chunk.parameters()]
        nbytes = sum(weight.nbytes for weight in weights)
        with mock.patch("megatron_export.checkpoint.original.read_config", lambda *_, **__: config):
            measure()
            export_hf_checkpoint(
                model, folder, hf_model=EXAMPLE, format="fp8", calibration=statistics, max_shard_size=SHARD
            )
            return nbytes, resident("VmHWM") - nbytes


@pytest.mark.parametrize("layers", [10, 20, 40])
def test_the_writer_needs_two_shards_and_a_gigabyte_whatever_the_size_of_the_model(layers: int, tmp_path: Path) -> None:
    """Of 0.3, 0.6 and 1.2 GB; the other rank a gigabyte beside its weights."""
    ranks = Ranks(2)  # new ones, whose heaps are empty
    (weights, writer), (_, other) = ranks.call(2, peak_beside_weights, tmp_path / "out", layers)
    ranks.close()
    print(f"2 x {weights:,} bytes of weights: writer {writer:,} beside its own, other rank {other:,}")
    assert abs(2 * weights / (layers * 30.4e6) - 1) < 0.1
    assert writer < 2 * SHARD + 10**9
    assert other < 10**9


def test_24_layers_take_no_more_memory_than_3(tmp_path: Path) -> None:
    """The bound is a few copies of a bucket and the float32 strips of an encoder. 21 more layers weigh 83 MB a rank in
    bfloat16; 16 MB are left for what differs between runs in one process.
    """
    ranks = Ranks(2)  # new ones: what other tests left free in their heaps would be taken before memory is seen to rise
    few = [ranks.call(2, peak_of_export, tmp_path / f"few{run}", 3) for run in range(2)]
    many = ranks.call(2, peak_of_export, tmp_path / "many", 24)
    ranks.close()
    for rank in (0, 1):
        assert many[rank] < max(run[rank] for run in few) + (16 << 20), (few, many)
