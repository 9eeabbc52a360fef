"""Parameters that are not what they say: read through their own `dequantize` on every path, or refused by name on every rank."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_export import (
    ExportError,
    calibrate,
    export_hf_checkpoint,
    export_hf_checkpoint_async,
    iter_hf_tensors,
    plan_hf_tensors,
)
from megatron_export.common.shards import plain, unreadable
from megatron_export.common.storage import shortage
from megatron_export.mcore.load_hf import load_hf_weights

from ..support.additions import adapt
from ..support.live import batches, loaded
from ..support.models import assert_same, contents, read_json, same, tensors
from ..support.quantized import (
    Broken,
    Flat,
    Float8,
    Opaque,
    Wide,
    dequantize_parameters,
    quantize_parameters,
    replace_parameter,
)
from ..support.ranks import Ranks

CPU = torch.device("cpu")
FORMATS = ("bf16", "fp8_pb", "nvfp4", "nvfp4_awq")


def export_every_way(model: nn.Module, source: Path, out: Path) -> dict[str, dict[str, Tensor]]:
    """In a rank: calibrate and export a model; the statistics, and what is streamed to every rank, by format."""
    statistics = calibrate(model, batches(source), format="nvfp4_awq")
    found = {"statistics": statistics}
    for form in FORMATS:
        asked = {"hf_model": source, "format": form, "calibration": statistics}
        export_hf_checkpoint(model, out / form, **asked)
        found[form] = dict(iter_hf_tensors(model, everywhere=True, **asked))
    asked = {"hf_model": source, "format": "fp8_pb", "calibration": statistics}
    export_hf_checkpoint_async(model, out / "background", **asked).wait()
    return found


def quantized_and_not(source: Path, out: Path, tp: int) -> tuple[list[dict], tuple[str, ...], int]:
    """In a rank: what a model of FP8 weights gives, and one of their numbers in bfloat16; what the plan of the first says."""
    with loaded(source, tp) as (model, _):
        before = [weight.clone() for weight in model.parameters() if weight.dim() == 2]
        count = quantize_parameters(model)
        remarks = plan_hf_tensors(model, hf_model=source, format="fp8_pb").plan.remarks
        found = [export_every_way(model, source, out / "quantized")]
        assert sum(isinstance(weight, Float8) for weight in model.parameters()) == count == len(before)
        dequantize_parameters(model)
        assert any(not same(a, b) for a, b in zip(before, (p for p in model.parameters() if p.dim() == 2), strict=True))
        found.append(export_every_way(model, source, out / "plain"))
        return found, remarks, count


@pytest.mark.whole
@pytest.mark.parametrize(("name", "tp"), [("llama31", 2), ("qwen3_moe", 1)])
def test_parameters_that_say_bfloat16_and_hold_bytes_give_the_bytes_of_their_dequantized_numbers(
    name: str, tp: int, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    for (quantized, dequantized), remarks, count in ranks.call(tp, quantized_and_not, models[name], tmp_path, tp):
        for key, found in dequantized.items():
            assert_same(quantized[key], found)
        assert any(f"{count} parameters are tests.support.quantized.Float8" in remark for remark in remarks)
    for form in FORMATS:
        expected = contents(tmp_path / "plain" / form)
        assert len(tensors(tmp_path / "plain" / form)) > 30
        assert contents(tmp_path / "quantized" / form) == expected
    assert contents(tmp_path / "quantized" / "background") == contents(tmp_path / "plain" / "fp8_pb")


class Memory(bytearray):
    """What dequantized numbers lie in, so that it is known when they are gone."""


class Weighed(Float8):
    """One of which it is known how many bytes of dequantized numbers there are at a time, and were in all."""

    now = most = total = 0

    def dequantize(self) -> Tensor:
        numbers = super().dequantize()
        memory = Memory(numbers.view(torch.uint8).numpy().tobytes())
        weakref.finalize(memory, Weighed.note, -len(memory))
        self.note(len(memory))
        return torch.frombuffer(memory, dtype=torch.bfloat16).view(numbers.shape)

    @staticmethod
    def note(size: int) -> None:
        Weighed.now += size
        Weighed.most = max(Weighed.most, Weighed.now)
        Weighed.total += max(size, 0)


def weighed(source: Path) -> tuple[list[int], int, int]:
    """In a rank: bytes of dequantized numbers that a plan and a stream had made in all; the most at a time; and what was left."""
    with loaded(source, 1) as (model, _):
        quantize_parameters(model, Weighed)
        totals = []
        plan = plan_hf_tensors(model, hf_model=source, format="fp8_pb", bucket_bytes=20_000)
        totals.append(Weighed.total)
        for _ in iter_hf_tensors(model, plan=plan):
            pass
        return [*totals, Weighed.total], Weighed.most, Weighed.now


@pytest.mark.whole
def test_no_second_copy_of_a_quantized_model_is_made(models: dict, ranks: Ranks) -> None:
    """A plan reads nothing; an export reads all of it twice, and has a few parameters at a time."""
    (((planned, streamed), most, left),) = ranks.call(1, weighed, models["llama31"])
    whole = (
        sum(t.nbytes for t in tensors(models["llama31"]).values() if t.dim() == 2) + 2 * 12 * 64 * 2
    )  # padded to 512 rows
    assert (planned, streamed, left) == (0, 2 * whole, 0)
    assert most < whole / 2


def merged(source: Path, out: Path, style: str) -> None:
    """In a rank: export a model of FP8 weights with FP8 adapters, and the same numbers in bfloat16."""
    with loaded(source, 2) as (model, _):
        adapt(model, style)
        quantize_parameters(model)
        export_hf_checkpoint(model, out / "quantized", hf_model=source, format="bf16", merge_lora=True)
        dequantize_parameters(model)
        export_hf_checkpoint(model, out / "plain", hf_model=source, format="bf16", merge_lora=True)


@pytest.mark.whole
@pytest.mark.parametrize("style", ["bridge", "modelopt"])
def test_adapters_of_quantized_parameters_are_merged(style: str, models: dict, ranks: Ranks, tmp_path: Path) -> None:
    ranks.call(2, merged, models["llama31"], tmp_path, style)
    assert_same(tensors(tmp_path / "quantized"), tensors(tmp_path / "plain"))


def opaque(module: nn.Module) -> None:
    replace_parameter(module, "weight", Opaque.of(module.weight))


def freed(module: nn.Module) -> None:
    module.weight.untyped_storage().resize_(0)


def halved(module: nn.Module) -> None:
    module.weight.untyped_storage().resize_(module.weight.nbytes // 2)


def on_meta(module: nn.Module) -> None:
    replace_parameter(module, "weight", torch.empty_like(module.weight, device="meta"))


def codes(module: nn.Module) -> None:
    replace_parameter(module, "weight", module.weight.detach().to(torch.float8_e4m3fn))


DAMAGES: dict[Callable[[nn.Module], None], tuple[str, ...]] = {
    opaque: ("is a tests.support.quantized.Opaque", "no dequantize() of its own. Give the class one, or export from"),
    freed: ("bytes of memory, and has 0. Let what has freed or offloaded it",),
    halved: ("bytes of memory, and has", "bring it back before the export"),
    on_meta: ("is on the meta device: it has no numbers. Load the weights before the export",),
    codes: ("is torch.float8_e4m3fn: codes, whose scales are elsewhere. Export the model that they were made of",),
}
DAMAGED = "decoder.layers.2.mlp.linear_fc2.weight"


def refusals(source: Path, out: Path, damage: Callable[[nn.Module], None]) -> list[str]:
    """In a rank: what every path says of a model of which rank 1 has a damaged parameter."""
    with loaded(source, 2) as (model, here):
        asked = {"hf_model": source, "format": "fp8_pb"}
        plan = plan_hf_tensors(model, **asked)
        if here.rank == 1:
            damage(model.decoder.layers[2].mlp.linear_fc2)
        said = []
        for way in (
            lambda: export_hf_checkpoint(model, out / "waited", **asked),
            lambda: export_hf_checkpoint_async(model, out / "background", **asked),
            lambda: plan_hf_tensors(model, **asked),
            lambda: list(iter_hf_tensors(model, plan=plan)),
            lambda: calibrate(model, batches(source)),
        ):
            with pytest.raises(ExportError) as refusal:
                way()
            assert refusal.value.everywhere
            said.append(str(refusal.value))
        return said


@pytest.mark.whole
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_parameter_that_cannot_be_read_is_refused_by_name_on_every_rank_and_path(
    damage: Callable, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    first, second = ranks.call(2, refusals, models["llama31"], tmp_path, damage)
    assert first == second
    for said in first:
        assert said.startswith("rank 1 failed to ") and DAMAGED in said
        assert [word for word in DAMAGES[damage] if word not in said] == [], said
    assert list(tmp_path.iterdir()) == []


def refusal_of_loading(source: Path) -> str:
    """In a rank: what is said of weights that are loaded into quantized parameters."""
    with loaded(source, 1) as (model, here):
        quantize_parameters(model)
        with pytest.raises(ExportError) as refusal:
            load_hf_weights(model, source, read_json(source / "config.json"), here)
        return str(refusal.value)


@pytest.mark.whole
def test_weights_are_not_loaded_into_quantized_parameters(models: dict, ranks: Ranks) -> None:
    (said,) = ranks.call(1, refusal_of_loading, models["llama31"])
    assert "decoder.layers.0.self_attention.linear_qkv.weight is a tests.support.quantized.Float8" in said
    assert "Build the model without quantized parameters" in said


@contextmanager
def refusing(*words: str) -> Iterator[None]:
    with pytest.raises(ExportError) as refusal:
        yield
    assert [word for word in words if word not in str(refusal.value)] == []


def test_what_dequantize_gives_is_compared_with_what_the_parameter_says() -> None:
    weight = torch.randn(8, 4, dtype=torch.bfloat16)
    found = plain("x", nn.Parameter(Float8.of(weight)))
    assert type(found) is Tensor and not found.requires_grad
    assert same(found, Float8.of(weight).dequantize())
    with refusing("x: dequantize() of tests.support.quantized.Broken failed (NotImplementedError: the codes are trans"):
        plain("x", Broken.of(weight))
    with refusing("x is a", "says torch.bfloat16 (8, 4) on cpu", "gives a Tensor, torch.bfloat16 (32,) on cpu"):
        plain("x", Flat.of(weight))
    with refusing("x is a", "says torch.bfloat16 (8, 4) on cpu", "gives a Tensor, torch.float32 (8, 4) on cpu"):
        plain("x", Wide.of(weight))


def test_a_parameter_on_another_device_cannot_be_read() -> None:
    weight = torch.ones(2, 2)
    for tensor in (weight, Float8.of(weight)):
        assert unreadable("x", tensor, CPU) == ""
        said = unreadable("x", tensor, torch.device("cuda", 1))
        assert said == "x is on cpu, and this rank works on cuda:1. Move it there before the export"


def test_memory_is_compared_with_shape_strides_and_offset() -> None:
    base = torch.zeros(24)
    for view in (base, base[4:], base.view(4, 6).T, base[::5], base.view(2, 12)[1], base[:1].expand(100), base[:0]):
        assert shortage(view) == ""
    fitting = [base[:20], base[3:20:4], base.view(4, 6)[:3]]
    too_large = [base[1:], base[3::5], base.view(4, 6).T]
    base.untyped_storage().resize_(4 * 20)
    assert shortage(base) == "as torch.float32 (24,) it takes 96 bytes of memory, and has 80"
    assert [shortage(view) for view in fitting] == [""] * 3
    assert all(shortage(view) for view in too_large)
    assert "not dense" in shortage(torch.eye(3).to_sparse())
