"""Live models: what calibration and export leave behind, wrapped models, virtual pipelines, float32, fused norms."""

import io
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from megatron_export import calibrate, export_hf_checkpoint
from megatron_export.mcore.build import build_model
from megatron_export.mcore.cpu_compat import without_cuda
from megatron_export.mcore.model import linear_input, shards_of

from ..support.live import batches, differences, loaded, traces
from ..support.models import EXAMPLE, LENGTH, assert_same, read_json, tensors
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

SCRIPT = Path(__file__).parents[2] / "examples" / "export_from_training.py"


def export_all(model: nn.Module | list[nn.Module], source: Path, out: Path, statistics: dict[str, Tensor]) -> None:
    """In a rank: export in every format to folders of `out`."""
    smoothed = any(".pre_quant_scale.nvfp4" in name for name in statistics)
    for form in ("bf16", "fp8", "fp8_pb", "nvfp4", *(["nvfp4_awq"] if smoothed else [])):
        kv_cache = "none" if form == "bf16" else "fp8"
        export_hf_checkpoint(model, out / form, hf_model=source, format=form, calibration=statistics, kv_cache=kv_cache)


def assert_same_exports(left: Path, right: Path) -> None:
    """Two folders that `export_all` wrote hold the same tensors in every format."""
    assert {path.name for path in left.iterdir()} == {path.name for path in right.iterdir()}
    for folder in left.iterdir():
        assert_same(tensors(folder), tensors(right / folder.name))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The training loss of one batch."""
    length = ids.shape[1] - 1
    positions = torch.arange(length).expand_as(ids[:, 1:])
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with without_cuda():
        return model(ids[:, :-1], positions, mask, labels=ids[:, 1:]).float().mean()


def leave_alone(source: Path, out: Path, tp: int, pp: int) -> tuple[int, list[str]]:
    """In a rank: calibrate and export a model in the middle of training; returns what was compared and what changed."""
    with loaded(source, tp, pp) as (model, here):
        model.decoder.layers[0].eval()
        model.decoder.layers[1].mlp.requires_grad_(False)
        model.decoder.register_forward_hook(lambda *_: None)
        for number, weight in enumerate(model.parameters()):
            weight.grad = torch.randn_like(weight) if weight.requires_grad and number % 2 else None
        before = traces(model)
        statistics = calibrate(model, batches(source), format=("nvfp4_awq", "int4_awq"), awq_clip=True)
        after_calibrate = differences(before, traces(model))
        options = {"format": "nvfp4_awq", "kv_cache": "fp8", "awq_clip": True}
        export_hf_checkpoint(model, out, hf_model=source, calibration=statistics, **options)
        return len(before), after_calibrate + differences(before, traces(model))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_the_model_is_left_exactly_as_it_was(tp: int, pp: int, models: dict, ranks: Ranks, tmp_path: Path) -> None:
    for compared, changed in ranks.call(2, leave_alone, models["qwen3"], tmp_path / "out", tp, pp):
        assert compared > 500
        assert changed == []


def train(source: Path, out: Path | None) -> list[float]:
    """In a rank: losses of a few steps with dropout; with `out`, the model is calibrated and exported amid them."""
    losses = []
    with loaded(source, 2) as (model, _):
        for layer in model.decoder.layers:
            layer.hidden_dropout = 0.1
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step, ids in enumerate(batches(source, 2)):
            optimizer.zero_grad()
            loss = loss_of(model, ids)
            loss.backward()
            if out and step == 1:  # gradients are there, and must not take part
                statistics = calibrate(model, batches(source))
                export_hf_checkpoint(model, out, hf_model=source, calibration=statistics)
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_training_goes_on_as_if_nothing_had_been_exported(models: dict, ranks: Ranks, tmp_path: Path) -> None:
    undisturbed = ranks.call(2, train, models["llama31"], None)
    assert len(set(undisturbed[0])) == 4
    assert ranks.call(2, train, models["llama31"], tmp_path / "out") == undisturbed
    assert tensors(tmp_path / "out")


def _megatron_ddp(module: nn.Module, config: object, **settings: object) -> nn.Module:
    with without_cuda():
        return DistributedDataParallel(config, DistributedDataParallelConfig(**settings), module)


def _torch_ddp(model: GPTModel) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, process_group=parallel_state.get_data_parallel_group())


WRAPPINGS: dict[str, Callable[[GPTModel], nn.Module]] = {
    "float16": lambda model: Float16Module(model.config, model),
    "megatron-ddp": lambda model: _megatron_ddp(model, model.config),
    "ddp-of-float16": lambda model: _megatron_ddp(
        Float16Module(model.config, model), model.config, use_distributed_optimizer=True, grad_reduce_in_fp32=True
    ),
    "torch-ddp": _torch_ddp,
    "list-of-one": lambda model: [model],
}


def export_wrapped(source: Path, out: Path, wrapping: str) -> None:
    """In a rank: calibrate and export the same model bare and wrapped."""
    with loaded(source, 2) as (model, _):
        export_all(model, source, out / "bare", calibrate(model, batches(source)))
        wrapped = WRAPPINGS[wrapping](model)
        export_all(wrapped, source, out / "wrapped", calibrate(wrapped, batches(source)))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_model_exports_the_bytes_of_the_bare_one(
    wrapping: str, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    ranks.call(4, export_wrapped, models["qwen3"], tmp_path, wrapping)  # two replicas of TP=2
    assert_same_exports(tmp_path / "wrapped", tmp_path / "bare")


def export_virtual(source: Path, out: Path, group: int, wrapped: bool) -> tuple[dict[str, Tensor], list[str]]:
    """In a rank of PP=2: export its two virtual stages, which take micro-batches in groups of `group`; returns the statistics and
    each progress that was made.
    """
    made: list[str] = []

    def progress(stage: str, steps: list[Tensor]) -> Iterator[Tensor]:
        for step in steps:
            made.append(stage)
            yield step

    with loaded(source, pp=2, vpp=2) as (model, _):
        model[0].config.microbatch_group_size_per_vp_stage = group
        if wrapped:
            model = [_megatron_ddp(Float16Module(chunk.config, chunk), chunk.config) for chunk in model]
        statistics = calibrate(model, batches(source, 3), format="nvfp4_awq", progress=progress)
        export_all(model, source, out, statistics)
    return statistics, made


def export_alone(source: Path, out: Path) -> dict[str, Tensor]:
    """In a rank alone: export the whole model; returns the statistics."""
    with loaded(source, 1) as (model, _):
        statistics = calibrate(model, batches(source, 3), format="nvfp4_awq")
        export_all(model, source, out, statistics)
    return statistics


@pytest.mark.parametrize(("name", "group", "wrapped"), [("qwen2", 2, False), ("qwen3", 3, True)])
def test_virtual_pipeline_chunks_give_the_statistics_and_bytes_of_one_rank(
    name: str, group: int, wrapped: bool, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """8 samples in batches of 3, 3 and 2: no group that the interleaved schedule takes is full."""
    (alone,) = ranks.call(1, export_alone, models[name], tmp_path / "alone")
    for statistics, made in ranks.call(2, export_virtual, models[name], tmp_path / "chunks", group, wrapped):
        assert_same(statistics, alone)
        assert (made.count("calibrate"), made.count("search")) == (3, 3)
    assert_same_exports(tmp_path / "chunks", tmp_path / "alone")


def export_float32(source: Path, out: Path) -> bool:
    """In a rank: export a float32 model and its bfloat16 rounding; returns whether rounding changed any weight."""
    with loaded(source, 2, dtype=torch.float32) as (model, here):
        precise = shards_of(model)
        for name, weight in precise.items():
            torch.manual_seed(len(name))  # the same noise on both ranks, which share the norms
            weight *= 1 + 0.01 * torch.randn_like(weight)
        statistics = calibrate(model, batches(source))
        export_all(model, source, out / "float32", statistics)
        rounded = build_model(read_json(source / "config.json"), here, max_sequence_length=LENGTH)
        for name, weight in shards_of(rounded).items():
            weight.copy_(precise[name])
        export_all(rounded, source, out / "rounded", statistics)
        return any(not torch.equal(weight.float(), precise[name]) for name, weight in shards_of(rounded).items())


def test_a_float32_model_exports_the_bytes_of_its_bfloat16_rounding(models: dict, ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.call(2, export_float32, models["llama32"], tmp_path) == [True, True]
    assert_same_exports(tmp_path / "float32", tmp_path / "rounded")


class FusedLinear(ColumnParallelLinear):
    """A stand-in for Transformer Engine's linear that contains the norm before it, named as there."""

    def take(self, norm: nn.Module) -> None:
        """Become `norm` followed by what this was."""
        self.layer_norm_weight, self.eps = norm.weight, norm.eps
        self.normalization, self.zero_centered_gamma = "RMSNorm", False
        self.norm = [norm]  # in a list, so that it is no module of this one

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """The linear of the normed input."""
        return super().forward(self.norm[0](hidden), *args, **kwargs)


def export_fused(source: Path, out: Path) -> tuple[list[str], bool]:
    """In a rank: export with separate norms, then with fused ones; returns the fused names, whether inputs agree."""
    with loaded(source, 2) as (model, here):
        before = calibrate(model, batches(source))
        export_all(model, source, out / "separate", before)
        agree = True
        for layer in model.decoder.layers:
            for owner, name, linear in (
                (layer, "input_layernorm", layer.self_attention.linear_qkv),
                (layer, "pre_mlp_layernorm", layer.mlp.linear_fc1),
            ):
                norm = getattr(owner, name)
                linear.__class__ = FusedLinear
                linear.take(norm)
                setattr(owner, name, IdentityOp())
                hidden = torch.randn(LENGTH, 2, model.config.hidden_size, dtype=torch.bfloat16)
                agree &= torch.equal(linear_input(linear, hidden), norm(hidden))
        after = calibrate(model, batches(source))
        assert_same(after, before)
        export_all(model, source, out / "fused", after)
        return [name for name, _ in model.named_parameters() if "norm" in name], agree


@pytest.mark.parametrize("name", ["llama31", "qwen3"])
def test_norms_fused_into_linears_are_understood(name: str, models: dict, ranks: Ranks, tmp_path: Path) -> None:
    for norms, agree in ranks.call(2, export_fused, models[name], tmp_path):
        assert {"decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
                "decoder.layers.3.mlp.linear_fc1.layer_norm_weight"} <= set(norms)  # fmt: skip
        assert not [norm for norm in norms if "input_layernorm" in norm or "pre_mlp_layernorm" in norm]
        assert agree
    assert_same_exports(tmp_path / "fused", tmp_path / "separate")
    assert_same(tensors(tmp_path / "fused" / "bf16"), tensors(models[name]))


def export_nan_padding(source: Path, out: Path) -> int:
    """In a rank: export with NaN in the rows that pad the vocabulary; returns how many this rank has."""
    with loaded(source, 2) as (model, here):
        padding = 0
        for weight in (model.embedding.word_embeddings.weight.detach(), model.output_layer.weight.detach()):
            real = max(read_json(source / "config.json")["vocab_size"] - here.tp_rank * weight.shape[0], 0)
            weight[real:] = torch.nan
            padding += len(weight[real:])
        export_all(model, source, out, calibrate(model, batches(source)))
        return padding


def test_padded_vocabulary_rows_are_trimmed_even_when_nan(models: dict, ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.call(2, export_nan_padding, models["llama31"], tmp_path) == [0, 2 * 12]
    assert_same(tensors(tmp_path / "bf16"), tensors(models["llama31"]))
    for form in ("fp8", "nvfp4"):
        found = tensors(tmp_path / form)
        assert found["lm_head.weight"].shape == found["model.embed_tokens.weight"].shape == (500, 64)
        assert [name for name in found if found[name].float().isnan().any()] == []


def as_torchrun_starts(script: Path, *flags: object) -> str:
    """In a rank: what a script prints that torchrun starts, on the CPU."""
    arguments = mock.patch.object(sys, "argv", list(map(str, (script, *flags))))
    no_gpu = mock.patch.object(torch.cuda, "is_available", lambda: False)
    with arguments, no_gpu, redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(script), run_name="__main__")
    parallel_state.destroy_model_parallel()
    return printed.getvalue()


def test_the_training_example_runs_and_exports(ranks: Ranks, tmp_path: Path) -> None:
    flags = ("--steps", 4, "--export-at", 2, "--output", tmp_path / "out")
    said, nothing = ranks.call(2, as_torchrun_starts, SCRIPT, *flags)
    assert [line.split()[1] for line in said.splitlines() if line.startswith("step")] == ["1", "2", "3", "4"]
    assert nothing == ""
    found, config = tensors(tmp_path / "out"), read_json(tmp_path / "out" / "config.json")
    assert config["quantization_config"]["quant_algo"] == "FP8"
    linears = [name.removesuffix(".weight") for name in found if name.endswith("_proj.weight")]
    assert len(linears) == 7 * config["num_hidden_layers"]
    for linear in linears:
        assert found[f"{linear}.weight"].dtype == torch.float8_e4m3fn
        assert found[f"{linear}.weight_scale"] > 0
        assert found[f"{linear}.input_scale"] > 0
    for name in ("tokenizer.json", "hf_quant_config.json"):
        assert (tmp_path / "out" / name).is_file()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (EXAMPLE / "tokenizer.json").read_bytes()
