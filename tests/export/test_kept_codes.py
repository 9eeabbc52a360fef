"""Parameters quantized in the blocks of the export's format: their codes and scales are written, and nothing is rounded twice."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_export import export_hf_checkpoint, iter_hf_tensors, plan_hf_tensors
from megatron_export.common.blocks import MX, SQUARES, blocks_in, scales_in
from megatron_export.common.piece import Amax
from megatron_export.formats import FORMATS, Options, chosen, encode
from megatron_export.models.layouts import QKV, Split
from megatron_export.planning.kept_codes import _aligned, blocks_of

from ..support.live import loaded
from ..support.models import read_json, same, tensors
from ..support.quantized import Blockwise, Float8, Mx, quantize_parameters
from ..support.ranks import Ranks

KINDS = {"fp8_pb": Blockwise, "mxfp8": Mx}
SCALES = {"fp8_pb": "weight_scale_inv", "mxfp8": "weight_scale"}
NAN = (0x7F, 0xFF)


@pytest.mark.parametrize(("name", "spelling"), [("fp8_pb", "native"), ("fp8_pb", "modelopt"), ("mxfp8", "native")])
def test_every_code_is_found_again_under_its_scale(name: str, spelling: str) -> None:
    """Of bfloat16 values under any scale: all finite codes, subnormal ones and the negative zero, in every block."""
    tall, wide = KINDS[name].tile
    form = chosen(name, Options(fp8_pb_spelling=spelling))
    every = torch.tensor([code for code in range(256) if code not in NAN], dtype=torch.uint8)
    shape = (5 * 128 - 28, 640)
    codes = every[torch.randint(len(every), shape, generator=torch.Generator().manual_seed(1))]
    counts = (-(-shape[0] // tall), shape[1] // wide)
    exponents = torch.randint(-30, 20, counts, generator=torch.Generator().manual_seed(2))
    if name == "mxfp8":
        scales = (exponents + 127).to(torch.uint8)
        numbers = torch.exp2(exponents.float())
    else:
        scales = numbers = torch.exp2(exponents.float()) * torch.linspace(0.51, 1.97, exponents.numel()).view(counts)
    values = codes.view(torch.float8_e4m3fn).float() * Blockwise.spread.__func__(KINDS[name], numbers, shape)
    made = encode(form, values.to(torch.bfloat16), Amax(torch.tensor(1.0), torch.tensor(1.0), scales=scales))
    assert torch.equal(made["weight"].data.view(torch.uint8), codes)
    assert torch.equal(made[form.scale].data.reshape(counts), scales)


def test_formats_say_of_which_blocks_they_are() -> None:
    assert {name: blocks_of(chosen(name, Options())) for name in FORMATS if chosen(name, Options()).quantization} == {
        name: {"fp8_pb": SQUARES, "mxfp8": MX}.get(name) for name in FORMATS if name != "bf16"
    }


def test_blocks_are_found_by_attributes_and_nothing_else_is_taken_for_them() -> None:
    weight = torch.randn(300, 130, dtype=torch.bfloat16)
    found = Blockwise.of(weight)
    assert blocks_in(found) == SQUARES and scales_in(found).shape == (3, 2) and found._rowwise_scale_inv.shape == (3, 4)
    assert blocks_in(Mx.of(weight[:, :128])) == MX and scales_in(Mx.of(weight[:, :128])).shape == (300, 4)
    assert blocks_in(weight) is blocks_in(torch.nn.Parameter(weight)) is blocks_in(Float8.of(weight)) is None
    for changes in (
        {"_is_2D_scaled": False},
        {"_rowwise_data": None},
        {"_rowwise_scale_inv": None},
        {"_rowwise_scale_inv": torch.ones(2, 4)},
        {"_rowwise_scale_inv": torch.ones(3, 4, dtype=torch.uint8)},
        {"_fp8_dtype": SimpleNamespace(name="kFloat8E5M2")},
    ):
        other = Blockwise.of(weight)
        vars(other).update(changes)
        assert blocks_in(other) is None, changes
    swizzled = Mx.of(weight[:, :128])
    swizzled._with_gemm_swizzled_scales = True
    assert blocks_in(swizzled) is None


def test_parts_take_the_scales_of_blocks_that_hold_no_other_blocks_rows() -> None:
    large, small = QKV(2, 128), QKV(2, 64)
    assert _aligned(large, 1024, 0, 1, 128) and _aligned(large, 512, 1, 2, 128)
    assert not _aligned(small, 512, 0, 1, 128) and _aligned(small, 512, 0, 1, 1)
    assert _aligned(Split(("gate", "up")), 512, 0, 1, 128) and not _aligned(Split(("gate", "up")), 384, 0, 1, 128)


def kept(source: Path, out: Path, name: str, tp: int) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """In a rank: what is streamed of a model of such parameters, and codes and scales of its layer 0, before they are cut."""
    with loaded(source, tp) as (model, _):
        quantize_parameters(model, KINDS[name])
        layer = model.decoder.layers[0]
        linears = {
            "self_attn.o_proj": layer.self_attention.linear_proj,
            "mlp.down_proj": layer.mlp.linear_fc2,
            "mlp.gate_up": layer.mlp.linear_fc1,
        }
        mine = {}
        for module, linear in linears.items():
            mine[f"{module}.weight"] = linear.weight._rowwise_data.view(torch.float8_e4m3fn)
            mine[f"{module}.{SCALES[name]}"] = scales_in(linear.weight)
        plan = plan_hf_tensors(model, hf_model=source, format=name)
        export_hf_checkpoint(model, out, hf_model=source, format=name)
        return dict(iter_hf_tensors(model, plan=plan, everywhere=True)), mine, plan.plan.remarks


@pytest.mark.parametrize(("name", "tp"), [("fp8_pb", 1), ("mxfp8", 1), ("mxfp8", 2)])
def test_codes_and_scales_of_a_live_model_are_written_as_they_are(
    name: str, tp: int, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    found = ranks.call(tp, kept, models["llama31"], tmp_path / "out", name, tp)
    streamed, _, remarks = found[0]
    shards = [mine for _, mine, _ in found]
    written = tensors(tmp_path / "out")
    assert written.keys() == streamed.keys() and all(same(written[n], streamed[n]) for n in written)
    for module in ("self_attn.o_proj", "mlp.down_proj")[: 3 - tp]:  # at TP 2, a block of down_proj lies on both ranks
        for suffix in ("weight", SCALES[name]):
            whole = torch.cat([shard[f"{module}.{suffix}"].view(torch.uint8) for shard in shards], dim=1)
            assert torch.equal(written[f"model.layers.0.{module}.{suffix}"].view(torch.uint8), whole), (module, suffix)
    if name == "mxfp8":  # in fp8_pb, a block has rows of gate and of up, so that both are rounded anew
        halves = [shard["mlp.gate_up.weight"].view(torch.uint8).chunk(2) for shard in shards]
        for number, part in enumerate(("gate_proj", "up_proj")):
            whole = torch.cat([half[number] for half in halves])
            assert torch.equal(written[f"model.layers.0.mlp.{part}.weight"].view(torch.uint8), whole)
    layers = read_json(models["llama31"] / "config.json")["num_hidden_layers"]
    count = (4 if (name, tp) == ("mxfp8", 1) else 3) * layers
    said = f"of {count} the codes and scales are written as they are; of the others the checkpoint is made of what their own"
    assert any(said in remark for remark in remarks), remarks
