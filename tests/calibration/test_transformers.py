"""Calibration of transformers models: the statistics of Megatron's model of the same weights, and the model is left as it was.

Both models compute in float32, so that they differ by the order of their sums alone, and no token is routed otherwise: amaxes by
less than 1e-6. What is rounded to bfloat16 first (channels, outputs that an AWQ search compares, inputs in a format that is tried)
may fall on the other side: one number of eight bits by 2^-7, a sum of squares or products by 1 %. All that is chosen is equal.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_export import calibrate, export_hf_checkpoint
from megatron_export.common.errors import ExportError
from megatron_export.verify.judge import judge

from ..hf.test_other import made as other
from ..hf.test_sharded import by_tensor_parallelism
from ..support.live import batches, refusal
from ..support.live import loaded as megatron
from ..support.live_hf import Quantizer, assert_untouched, loaded, state_of, traces_of
from ..support.models import assert_same, make_model
from ..support.ranks import Ranks

ALL = {
    "format": ("fp8", "int4_awq", "nvfp4_awq"),
    "awq_clip": True,
    "sensitivities": ("nvfp4", "fp8"),
    "head": True,
}
CLOSE = {
    **dict.fromkeys(("input_amax", "k_amax", "v_amax"), 1e-6),
    **dict.fromkeys(("input_channel_amax", "v_channel_amax"), 2**-7),
    **dict.fromkeys(("tokens", "alpha", "clip", "clip_ratio"), 0.0),
    **dict.fromkeys(("losses", "sensitivity"), 1e-2),
    "pre_quant_scale": 1e-3,  # of mean magnitudes: many channels
}


class Expert(nn.Module):
    """One of the experts of transformers 4."""

    def __init__(self, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(*reversed(weight.shape), bias=False)
            linear.weight = nn.Parameter(weight.clone())
            self.add_module(name, linear)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(inputs)) * self.up_proj(inputs))


class Apart(nn.ModuleList):
    """The experts of a layer as transformers 4 has them, each called where a token is routed to it."""

    def forward(self, hidden: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, self[number](hidden[token]) * scores[token, place, None])
        return out


def apart(model: nn.Module) -> nn.Module:
    """The same model with experts as transformers 4 has them."""
    for name, module in list(model.named_modules()):
        if name.endswith(".mlp.experts"):
            pairs = zip(module.gate_up_proj.data, module.down_proj.data, strict=True)
            model.set_submodule(name, Apart(Expert(*pair, module.act_fn) for pair in pairs))
    return model


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names of statistics that differ by more than they may."""
    assert sorted(found) == sorted(expected)
    return [name for name, tensor in found.items() if not _close(name, tensor, expected[name])]


def _close(name: str, tensor: Tensor, other: Tensor) -> bool:
    kind = next(word for word in name.split(".") if word in CLOSE)
    largest = other.double().abs().max()
    return tensor.shape == other.shape and bool((tensor.double() - other.double()).abs().max() <= CLOSE[kind] * largest)


def by_both(source: Path, name: str, how: dict, change: Callable[[nn.Module], nn.Module] | None) -> list[str]:
    """In a rank: which statistics of the two models differ; the transformers one is left as it was. In float64, because an input
    between two codes is rounded to either by last bits, which in float32 differ with the processor.
    """
    with megatron(source, dtype=torch.float64) as (model, _):
        expected = calibrate(model, batches(source), **how)
    model = loaded(source, name).double().train()
    model = change(model) if change else model
    state, traces = state_of(model), traces_of(model)
    found = calibrate(model, batches(source), **how)
    assert_untouched(model, state, traces)
    assert all(module.training for module in model.modules())
    return differing(found, expected)


@pytest.mark.parametrize(
    ("name", "how", "change"),
    [
        ("llama31", ALL, None),
        ("qwen3_moe", ALL, None),
        ("qwen3_moe", ALL, apart),
        ("deepseek_v3", ALL, None),
        ("mixtral", ALL, None),
        ("llama4", ALL, None),
        ("gpt_oss", {"format": "fp8"}, None),
        ("nemotron_h", {"format": "fp8", "sensitivities": ("nvfp4", "fp8"), "head": True}, None),
        ("qwen3_moe", {"format": "nvfp4_awq", "all_experts": True}, None),
        ("qwen3_moe", {"format": "nvfp4_awq", "all_experts": True}, apart),
        ("llama4", {"format": "nvfp4_awq", "all_experts": True}, None),
        ("gpt_oss", {"format": "fp8", "all_experts": True}, None),
        ("nemotron_h", {"format": "fp8", "all_experts": True}, None),
    ],
)
def test_both_models_have_the_same_statistics(
    name: str, how: dict, change: Callable | None, models: dict[str, Path], ranks: Ranks
) -> None:
    assert ranks.call(1, by_both, models[name], name, how, change, seconds=300) == [[]]


def search_refused(source: Path) -> tuple[str, str]:
    """In a rank: what a search by AWQ says of both models."""
    found, how = [], {"format": "nvfp4_awq"}
    with megatron(source) as (model, _):
        for one in (model, loaded(source, source.name)):
            found.append(refusal(calibrate, one, batches(source), **how))
    return tuple(found)


def test_awq_does_not_smooth_experts_that_read_a_latent(models: dict[str, Path], ranks: Ranks) -> None:
    [(said, other)] = ranks.call(1, search_refused, models["nemotron_h"])
    assert said.startswith("experts that read a latent share no input with the shared experts beside them")
    assert other == said


@pytest.mark.parametrize("name", ["llama31", "qwen3_moe"])
def test_what_is_measured_is_exported_and_judged_sound(name: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    source = make_model(tmp_path, name, **wide, **({"moe_intermediate_size": 128} if "moe" in name else {}))
    model = loaded(source, name)
    found = calibrate(model, batches(source), format=("int4_awq", "nvfp4_awq"))
    for form, cache in (
        ("fp8", "fp8"),
        ("nvfp4", "nvfp4"),
        ("int4_awq", None),
        ("w4a8_awq", None),
        ("nvfp4_awq", "fp8"),
    ):
        export_hf_checkpoint(model, tmp_path / form, format=form, kv_cache=cache, calibration=found)
        assert judge(tmp_path / form, source).problems == []


def two_tokens_each(source: Path) -> list[Tensor]:
    """Two batches of so few tokens that most experts are given none of one of them."""
    return [batch[:1, 5 * number : 5 * number + 2] for number, batch in enumerate(batches(source, 2)[:2])]


def dealt(
    source: Path,
    name: str,
    cut: bool,
    change: Callable[[nn.Module], nn.Module] | None = None,
    few: bool = False,
) -> tuple[dict[str, Tensor], bool]:
    """In a rank: the statistics of every rank's share of the data, of a model that FSDP2 cut or that each rank has; and whether its
    shards are what they were.
    """
    dist.init_process_group("gloo")
    try:
        model, rank, size = loaded(source, name).float(), dist.get_rank(), dist.get_world_size()
        model = change(model) if change else model
        if cut:
            mesh = init_device_mesh("cpu", (size,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        held = {key: type(tensor) for key, tensor in model.named_parameters()}
        data = two_tokens_each(source) if few else batches(source, 2)
        found = calibrate(model, data[rank::size], format="nvfp4_awq")
        return found, held == {key: type(tensor) for key, tensor in model.named_parameters()}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("name", "cut"), [("llama31", True), ("qwen3_moe", True), ("qwen3_moe", False)])
def test_ranks_that_have_a_share_of_the_data_each_agree(
    name: str, cut: bool, models: dict[str, Path], ranks: Ranks
) -> None:
    whole = calibrate(loaded(models[name], name).float(), batches(models[name], 2), format="nvfp4_awq")
    for found, unchanged in ranks.call(2, dealt, models[name], name, cut):
        assert differing(found, whole) == []
        assert unchanged


def test_an_expert_that_one_rank_alone_gives_tokens_to_holds_up_no_other(models: dict[str, Path], ranks: Ranks) -> None:
    """Experts that are modules are called where they have tokens; FSDP2 would gather the weights of the others on some ranks."""
    source, name = models["qwen3_moe"], "qwen3_moe"
    whole = calibrate(apart(loaded(source, name).float()), two_tokens_each(source), format="nvfp4_awq")
    for found, unchanged in ranks.call(2, dealt, source, name, True, apart, True, seconds=60):
        assert differing(found, whole) == []
        assert unchanged


def refused_on_ranks(source: Path, uneven: bool) -> str:
    """In a rank: what is said of a tensor-parallel model, or of a share of the data that is longer than the others'."""
    dist.init_process_group("gloo")
    try:
        model = loaded(source) if uneven else by_tensor_parallelism(source, "llama31")
        given = batches(source, 2)[: 1 + (uneven and dist.get_rank())]
        return refusal(calibrate, model, given)
    finally:
        dist.destroy_process_group()


def test_ranks_that_see_parts_of_inputs_or_have_more_batches_are_refused(models: dict[str, Path], ranks: Ranks) -> None:
    for said in ranks.call(2, refused_on_ranks, models["llama31"], False):
        assert "is cut over ranks, and not by FSDP2" in said
    for said in ranks.call(2, refused_on_ranks, models["llama31"], True):
        assert "ranks have [1, 2] batches. Give all as many" in said


def test_a_model_that_was_not_loaded_or_is_in_no_table_is_measured(models: dict[str, Path], tmp_path: Path) -> None:
    source = models["llama31"]
    model = loaded(source)
    expected = calibrate(model, batches(source))
    model.config.architectures = None  # as transformers leaves it where a model is made of a config
    assert_same(calibrate(model, batches(source)), expected)
    model = other("granite")
    found = calibrate(model, [torch.arange(64).view(2, 32)], format="nvfp4")
    report = export_hf_checkpoint(model, tmp_path / "out", format="nvfp4", calibration=found)
    assert "GraniteForCausalLM is in no table here" in report.plan.remarks[0]


def test_what_cannot_be_measured_is_refused(models: dict[str, Path]) -> None:
    source = models["llama31"]
    model = loaded(source)
    with pytest.raises(ExportError, match="outside the model's vocabulary"):
        calibrate(model, [torch.full((1, 4), 10**6)])
    model.lm_head.to("meta")
    with pytest.raises(ExportError, match="lm_head.weight is on the meta device"):
        calibrate(model, batches(source))
    model = loaded(source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"NaN or Inf in the activations of decoder.layers.1.mlp.linear_fc2"):
        calibrate(model, batches(source))
    model = loaded(source)
    model.model.layers[0].mlp.up_proj.add_module("input_quantizer", Quantizer({"_num_bits": 8, "_disabled": False}, {}))
    with pytest.raises(ExportError, match="ModelOpt quantizes this model"):
        calibrate(model, batches(source))
