"""What each format costs in each linear: transformers' own gradients say the same, and so does every topology."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_export import calibrate
from megatron_export.common.piece import Amax
from megatron_export.formats import chosen
from megatron_export.mcore.build import build_model
from megatron_export.mcore.load_hf import load_hf_weights
from megatron_export.mcore.parallel_state import current, started

from ..mcore.test_live_model import differences, traces
from ..support.models import LENGTH, assert_same, auto_model, make_model, read_json
from ..support.ranks import Ranks
from .test_experts import ids_of

pytestmark = pytest.mark.whole

FORMATS = ("nvfp4", "fp8", "fp8_pc_pt", "w4a16_nvfp4")
TOPOLOGIES: dict[str, tuple[int, dict]] = {
    "dp2": (2, {}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),  # a quarter of the down projection's input holds no whole block of nvfp4
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}),
    "tp2 sequence": (2, {"tp": 2}),
}
SEQUENCE = {
    "sequence_parallel": True,
    "allreduce_dgrad": False,
    "reduce_scatter_embeddings": True,
}  # as modules have it
PARTS = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}


def measure(
    source: Path, sizes: dict, dtype: torch.dtype, sequence: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """In a rank: the statistics of this topology, and what calibration changed in the live model."""
    config = read_json(source / "config.json")
    rest = {key: size for key, size in sizes.items() if key not in ("tp", "pp")}
    with started(sizes.get("tp", 1), sizes.get("pp", 1), "cpu", **rest), current() as here:
        model = build_model(config, here, max_sequence_length=LENGTH, dtype=dtype)
        load_hf_weights(model, source, config, here)
        chunks = model if isinstance(model, list) else [model]
        for module in chunks[0].modules() if sequence else ():
            for flag, value in SEQUENCE.items():
                if hasattr(module, flag):
                    setattr(module, flag, value)
            if hasattr(module, "config"):
                module.config.sequence_parallel = True
        before = [traces(chunk) for chunk in chunks]
        mine = ids_of(source).split(2)[here.dp_rank :: here.dp_size]
        found = calibrate(model, mine, format="bf16", sensitivities=FORMATS)
        changed = [name for chunk, was in zip(chunks, before, strict=True) for name in differences(was, traces(chunk))]
        return found, changed


def costs_in(found: dict[str, Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in found.items() if ".sensitivity." in key}


def transformers_own(source: Path, maxima: dict[str, Tensor]) -> dict[str, float]:
    """The same by transformers' model in float32, whole weights, and the gradients that torch keeps of all outputs."""
    model = auto_model("qwen3").from_pretrained(source, dtype=torch.float32).eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> object:
        def called(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = args[0], output

        return called

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(keep(name))
    ids = ids_of(source)
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    (-logits.gather(2, ids[:, 1:, None]).sum()).backward()
    costs = {}
    for layer in range(len(model.model.layers)):
        for local, parts in PARTS.items():
            module, names = f"decoder.layers.{layer}.{local}", [f"model.layers.{layer}.{part}" for part in parts]
            weights = [model.get_submodule(name).weight.detach().bfloat16() for name in names]
            amax = Amax(max(w.abs().max() for w in weights).float(), maxima[f"{module}.input_amax"])
            for form in map(chosen, FORMATS):
                slope = torch.zeros(ids.shape)
                for name, weight in zip(names, weights, strict=True):
                    inputs, output = seen[name]
                    pieces = form.encode(weight, amax)
                    scale = pieces["input_scale"].data if "input_scale" in pieces else None
                    rounded = form.decode(pieces).to(form.arithmetic.torch_dtype).float()
                    change = form.arithmetic.inputs(inputs.detach(), scale) @ rounded.T - inputs @ weight.float().T
                    slope += (output.grad * change).sum(-1).detach()
                costs[f"{module}.sensitivity.{form.name}"] = slope.square().sum().item() / (2 * ids.numel())
    return costs


@pytest.fixture(scope="module")
def alone(models: dict, pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    """A model, and what one rank measures of it, in bfloat16 and in float32."""
    if not pool:
        pool.append(Ranks(4))
    sources = {"qwen3": models["qwen3"], "qwen3_moe": make_model(tmp_path_factory.mktemp("moe"), "qwen3_moe")}
    found = {}
    for name, source in sources.items():
        measured = {dtype: pool[0].call(1, measure, source, {}, dtype)[0] for dtype in (torch.bfloat16, torch.float32)}
        assert [changed for _, changed in measured.values()] == [[], []]
        found[name] = source, {dtype: one for dtype, (one, _) in measured.items()}
    return found


def test_transformers_own_gradients_give_the_same_costs(alone: dict) -> None:
    source, measured = alone["qwen3"]
    found = measured[torch.float32]
    costs, expected = costs_in(found), transformers_own(source, found)
    assert costs.keys() == expected.keys()
    assert costs == pytest.approx(expected, rel=2e-2)
    assert all(costs[key] > 4 * costs[key.replace("nvfp4", "fp8")] for key in costs if key.endswith(".nvfp4"))


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        *(("qwen3", topology) for topology in ("dp2", "pp2", "pp2 vpp2", "tp2", "tp4", "tp2 pp2", "tp2 sequence")),
        *(("qwen3_moe", topology) for topology in ("dp2", "ep2", "tp2 etp1", "tp2 ep2")),
    ],
)
def test_every_topology_measures_the_same_costs(name: str, topology: str, alone: dict, ranks: Ranks) -> None:
    """To the bit where every matrix product is that of one rank; else but for the order of sums, in float32."""
    source, measured = alone[name]
    world, sizes = TOPOLOGIES[topology]
    same_products = name == "qwen3" and "tp" not in sizes
    dtype = torch.bfloat16 if same_products else torch.float32
    (here, changed), *others = ranks.call(world, measure, source, sizes, dtype, "sequence" in topology)
    for other, theirs in others:
        assert_same(other, here)
        assert theirs == changed == []
    costs, expected = costs_in(here), costs_in(measured[dtype])
    assert costs == (expected if same_products else pytest.approx(expected, rel=2e-2))
    assert len(costs) == 4 * len(FORMATS) * 4
