"""Memory of an export is bounded by its buckets: it does not grow with the number of layers, on any rank."""

from pathlib import Path
from unittest import mock

import torch

from megatron_export import export_hf_checkpoint, filing, topology
from megatron_export.build import build_model
from megatron_export.names import parameters_of

from ..models import EXAMPLE, read_json
from ..ranks import Ranks

BUCKET = 4 << 20
CONFIG = read_json(EXAMPLE / "config.json") | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}


def peak_of_export(folder: Path, layers: int) -> int:
    """Bytes by which this rank's memory rose above the loaded model's during an nvfp4 export at TP=2."""
    config = CONFIG | {"num_hidden_layers": layers}
    statistics = {
        name.removesuffix("weight") + "input_amax": torch.tensor(1.0)
        for name in parameters_of(config)
        if "linear" in name
    }
    with topology.started(2, 1, "cpu"):
        with topology.current() as here:
            torch.manual_seed(0)
            model = build_model(config, here, max_sequence_length=1, initialize=True)
        with (
            mock.patch.object(filing, "BUCKET_BYTES", BUCKET),
            mock.patch("megatron_export.assets.read_config", lambda _: config),
        ):
            before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            export_hf_checkpoint(model, folder, hf_model=EXAMPLE, format="nvfp4", calibration=statistics)
            return _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def test_24_layers_take_no_more_memory_than_3(tmp_path: Path) -> None:
    """The bound is a few copies of a bucket and the float32 strips of an encoder. 21 more layers weigh 83 MB a rank in
    bfloat16; 16 MB are left for what the allocator keeps between two runs in one process.
    """
    ranks = Ranks(2)  # new ones: what other tests left free in their heaps would be taken before memory is seen to rise
    few = [ranks.call(2, peak_of_export, tmp_path / f"few{run}", 3) for run in range(2)]
    many = ranks.call(2, peak_of_export, tmp_path / "many", 24)
    ranks.close()
    for rank in (0, 1):
        assert many[rank] < max(run[rank] for run in few) + (16 << 20), (few, many)
