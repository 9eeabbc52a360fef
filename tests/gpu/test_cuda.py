"""CUDA writes the bytes that the CPU writes: every format on single weights, the search, and whole exports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_export import formats
from megatron_export.calibration.amax import Maxima
from megatron_export.calibration.awq_search import Alphas
from megatron_export.checkpoint.hf_weights import SourceWeights
from megatron_export.common.piece import Amax
from megatron_export.formats import KV_FORMATS
from megatron_export.formats.awq import ALPHAS, SEARCHES, importance, largest, rounded
from megatron_export.formats.int4 import CLIP_RATIOS
from megatron_export.mcore import load_hf
from megatron_export.models import parameters_of

from ..formats.test_formats import ALL
from ..formats.test_golden_vectors import alone
from ..support.models import (
    ARCHITECTURES,
    EXAMPLE,
    GOLDEN,
    LENGTH,
    SAMPLES,
    assert_same,
    make_model,
    read_json,
    same,
    tensors,
)

ROOT = Path(__file__).parents[2]
VARIANTS = {name: form for name, form in ALL.items() if name != "nvfp4_awq modelopt"}  # of the numbers of nvfp4_awq


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", range(20))
def test_encoding_on_cuda_gives_the_bytes_of_the_cpu(name: str, seed: int, clip: bool) -> None:
    form, generator = VARIANTS[name], torch.Generator().manual_seed(seed)
    size = (200, 1000) if form.ragged else (256, 1024)
    weight = (torch.randn(size, generator=generator) * torch.rand(size[0], 1, generator=generator)).to(torch.bfloat16)
    weight[seed] = 0
    codes = torch.randint(0, len(CLIP_RATIOS), (256, 1024 // form.tile[1]), generator=generator, dtype=torch.uint8)
    grouped = form.smoothing is not None and form.smoothing.search.startswith("int4")  # the others take no codes
    amax = Amax(
        weight.abs().amax().float(), torch.rand((), generator=generator) * 100, codes if clip and grouped else None
    )
    there = Amax(amax.weight.cuda(), amax.input.cuda(), amax.clip.cuda() if amax.clip is not None else None)
    on_cpu = formats.encode(form, weight, amax)
    on_cuda = formats.encode(form, weight.cuda(), there)
    assert [suffix for suffix in on_cpu if not same(on_cuda[suffix].data.cpu(), on_cpu[suffix].data)] == []
    assert same(form.decode(on_cuda).cpu(), form.decode(on_cpu))
    for kv in (KV_FORMATS["fp8"], KV_FORMATS["nvfp4"]):
        for key, value in kv.encode(amax.weight, amax.input).items():
            assert same(kv.encode(there.weight, there.input)[key].cpu(), value)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("seed", range(5))
def test_a_search_rounds_and_weighs_on_cuda_as_on_the_cpu(name: str, seed: int) -> None:
    search, generator = SEARCHES[name], torch.Generator().manual_seed(seed)
    weight = (torch.randn(256, 1024, generator=generator) * 0.05).to(torch.bfloat16)
    weight[seed] = 0
    factors = (torch.rand(3, 1024, generator=generator) + 0.5).to(torch.bfloat16)
    amaxes = largest(weight, factors)
    assert same(amaxes, torch.stack([(weight * mine).abs().amax().float() for mine in factors]))
    assert same(largest(weight.cuda(), factors.cuda()).cpu(), amaxes)
    for mine, amax in zip(factors, amaxes, strict=True):
        found = rounded(search, weight.cuda(), mine.cuda(), amax.cuda())
        assert same(found.cpu(), search.rounded(weight * mine, amax))
    assert same(importance(weight.cuda(), search.group).cpu(), importance(weight, search.group))


def test_weights_reach_the_gpu_in_pieces_as_they_are_in_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_hf, "LOCKED_BYTES", 100_000)
    sources, whole = parameters_of(read_json(EXAMPLE / "config.json")), alone().cut(False)
    with SourceWeights(EXAMPLE) as weights:
        for source in sources.values():
            on_cpu, there = (
                torch.empty(source.shape, dtype=source.torch_dtype, device=where) for where in ("cpu", "cuda")
            )
            assert all(load_hf._read(weights, source, shard, whole)() for shard in (on_cpu, there))
            assert same(there.cpu(), on_cpu)
        there = torch.full((1000, 100), torch.nan, dtype=torch.bfloat16).pin_memory()
        assert not load_hf._send([there], torch.empty_like(there, device="cuda"), 1000)


@pytest.mark.parametrize("form", ["NVFP4_AWQ", "INT4_AWQ", "INT4_AWQ_G64"])
def test_the_search_on_cuda_chooses_the_vector_that_modelopt_chooses(form: str) -> None:
    """Means and factors are equal to the bit. Losses are not: cuBLAS adds up in another order, and an output is rounded
    to another bfloat16 now and then. 1e-3 is far below what parts one alpha from the next.
    """
    vector = load_file(GOLDEN / "vectors" / form / "s256x512.safetensors")
    name, key = "decoder.layers.0.mlp.linear_fc2", VARIANTS[form.lower().replace("_g64", " 64")].smoothing.search
    weight, batches = vector["in.weight"].cuda(), vector["in.x"].unflatten(0, (3, 4, 4)).cuda()
    maxima = Maxima(alone(), by_channel=True)
    for batch in batches:
        maxima.linear(name, weight, batch)
    mean = (maxima.sums[name] / maxima.counts[name]).float().cpu()
    assert same(mean, vector["search.act_scale"])
    alphas = Alphas(alone(), {name: mean}, lambda name: (key,), lambda values: values, {name: weight})
    for batch in batches:
        alphas.linear(name, weight, batch)
    losses = alphas.losses[name, key].cpu()
    best = losses.tolist().index(losses.min())
    assert ALPHAS[best] == vector["search.best_alpha"].item()
    # a float32 power differs in its last bits from one kind of CPU to another
    torch.testing.assert_close(alphas.factors[name, key][best].cpu(), vector["search.best_scale"], rtol=2**-20, atol=0)
    torch.testing.assert_close(losses, vector["search.loss"], rtol=1e-3, atol=0)


def export(ranks: int, *flags: object) -> None:
    """Run the command as a user does. On one GPU the ranks share it: NCCL takes ranks with host ids for far apart."""
    script = ROOT / "launch" / "export.py"
    inner = f'NCCL_HOSTID=$RANK exec "{sys.executable}" "{script}" ' + " ".join(map(str, flags))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(ranks), "--no-python"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [*torchrun, "bash", "-c", inner], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def measuring(source: Path) -> tuple:
    ids = source.parent / "ids" / "calibration.safetensors"
    return ("--calib-data", ids, "--calib-samples", SAMPLES, "--calib-seq-len", LENGTH)


def same_bytes(folder: Path, source: Path, common: tuple, first: tuple, *others: tuple) -> dict[str, torch.Tensor]:
    """The tensors of an export that measures, which the same export has elsewhere; how: the number of ranks, and flags."""
    file, common = folder / "calibration.safetensors", ("--hf-model", source, *common)
    ranks, *flags = first
    export(ranks, *common, *flags, *measuring(source), "--save-calibration", file, "--output", folder / "first")
    found = tensors(folder / "first")
    for number, (ranks, *flags) in enumerate(others):
        export(ranks, *common, "--load-calibration", file, *flags, "--output", folder / f"{number}")
        assert_same(tensors(folder / f"{number}"), found)
    return found


ON_CPU = ("--device", "cpu")


@pytest.mark.parametrize("name", ["llama31", "qwen2"])
def test_nccl_at_tp2_and_gloo_on_the_cpu_write_what_one_gpu_writes(name: str, models: dict, tmp_path: Path) -> None:
    assert name in ARCHITECTURES
    common = ("--format", "nvfp4", "--kv-cache", "fp8")
    same_bytes(tmp_path, models[name], common, (1,), (2, "--tp", 2), (2, "--pp", 2), (2, "--tp", 2, *ON_CPU))


@pytest.mark.parametrize("form", ["nvfp4_awq", "int4_awq"])
def test_a_smoothed_and_clipped_model_has_the_same_bytes_at_tp2_and_on_the_cpu(form: str, tmp_path: Path) -> None:
    """Grouped queries; a half of o_proj's 128 inputs and of down_proj's 384 cuts a group of int4."""
    source = make_model(tmp_path, "llama31", hidden_size=128, head_dim=16, intermediate_size=384)
    common = ("--format", form, "--kv-cache", "nvfp4", "--awq-clip")
    written = same_bytes(tmp_path, source, common, (1,), (2, "--tp", 2), (2, "--tp", 2, *ON_CPU))
    assert any(name.endswith("pre_quant_scale") for name in written) == (form == "int4_awq")


def test_experts_over_nccl_at_ep2_have_the_bytes_of_one_gpu_and_of_the_cpu(tmp_path: Path) -> None:
    """Latent attention, dense and sparse layers, shared experts; vectors that all experts share."""
    source = make_model(tmp_path, "deepseek_v3")
    same_bytes(
        tmp_path, source, ("--format", "nvfp4_awq", "--quantize-mla"), (2, "--ep", 2), (1,), (2, "--ep", 2, *ON_CPU)
    )


def test_two_gpu_ranks_search_together(tmp_path: Path) -> None:
    """NCCL ranks add up losses, gather what groups cut, and save the statistics that one rank saves: the same names and
    shapes, and alphas that are by one rank's own losses at most 8 % worse, for the reason in test_formats_on_topologies.
    """
    source = make_model(tmp_path, "llama31", hidden_size=128, head_dim=16, intermediate_size=384)
    found = []
    for ranks in (1, 2):
        file, out = tmp_path / f"tp{ranks}.safetensors", tmp_path / f"out{ranks}"
        flags = ("--hf-model", source, "--format", "int4_awq", "--awq-clip", "--tp", ranks, "--output", out)
        export(ranks, *flags, *measuring(source), "--save-calibration", file)
        found.append(load_file(file))
    one, two = found
    assert {key: value.shape for key, value in two.items()} == {key: value.shape for key, value in one.items()}
    alphas = [key for key in one if ".alpha." in key]
    assert len(alphas) == 4 * 7
    for key in alphas:
        losses = one[key.replace(".alpha.", ".losses.")]
        assert losses[round(two[key].item() * 10)] <= 1.08 * losses.min(), key
