"""Layer specs other than the local one: stand-ins with the names of Transformer Engine's modules, of its grouped experts
and of Megatron's own grouped GEMM, none of which runs on a CPU. And models whose names or shapes are wrong.
"""

from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_export import ExportError, calibrate, export_hf_checkpoint
from megatron_export.distributed import collectives
from megatron_export.distributed.collectives import whole
from megatron_export.distributed.topology import Topology
from megatron_export.export import transport
from megatron_export.mcore.build import build_model
from megatron_export.mcore.load_hf import load_hf_weights
from megatron_export.mcore.parallel_state import current, started

from ..support.models import LENGTH, assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks, living

pytestmark = pytest.mark.whole

FORMATS: dict[str, dict] = {
    "bf16": {},
    "fp8": {"quantize_mla": True},
    "fp8_pb": {},
    "nvfp4_awq": {"quantize_mla": True},
}
TOPOLOGIES: dict[str, tuple[int, dict]] = {
    "tp2": (2, {"tp": 2}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}),
}


def layers_of(model: GPTModel | list[GPTModel]) -> list[nn.Module]:
    return [layer for chunk in (model if isinstance(model, list) else [model]) for layer in chunk.decoder.layers]


def misleading(weight: Tensor, number: int) -> nn.Parameter:
    """The same numbers with the attributes that Transformer Engine leaves on some of its parameters: wrong ones."""
    held = nn.Parameter(weight.detach())
    held.tensor_model_parallel = weight.dim() == 1
    held.partition_dim = (0, 1, -1)[number % 3]
    held.partition_stride = 2
    held.allreduce = not getattr(weight, "allreduce", True)
    return held


def holding(**weights: Tensor) -> nn.Module:
    """A module that holds these and computes nothing."""
    module = nn.Module()
    for number, (name, weight) in enumerate(weights.items()):
        module.register_parameter(name, misleading(weight, number))
    return module


def fuse(owner: nn.Module, norm: str, linear: nn.Module) -> None:
    """Keep a norm inside the linear that follows it."""
    linear.layer_norm_weight = misleading(getattr(owner, norm).weight, 0)
    setattr(owner, norm, IdentityOp())


def transformer_engine(model: GPTModel | list[GPTModel], here: Topology) -> None:
    """Rename parameters to what Transformer Engine's spec calls them, and hold whole what it holds whole."""
    for layer in layers_of(model):
        attention = layer.self_attention
        if hasattr(attention, "linear_qkv"):
            fuse(layer, "input_layernorm", attention.linear_qkv)
        for which in ("q", "kv") if hasattr(attention, "linear_kv_up_proj") else ():
            name = f"linear_{which}_down_proj"
            if hasattr(attention, name):
                setattr(attention, name, holding(weight=whole(here.cut(False), getattr(attention, name).weight, 0)))
                fuse(attention, f"{which}_layernorm", getattr(attention, f"linear_{which}_up_proj"))
        if hasattr(layer.mlp, "experts"):
            experts = layer.mlp.experts.local_experts
            layer.mlp.experts = nn.Module()
            for name in ("linear_fc1", "linear_fc2"):
                weights = {f"weight{number}": getattr(expert, name).weight for number, expert in enumerate(experts)}
                setattr(layer.mlp.experts, name, holding(**weights))
        else:
            fuse(layer, "pre_mlp_layernorm", layer.mlp.linear_fc1)
        for module in layer.modules():
            for number, (name, weight) in enumerate(list(module.named_parameters(recurse=False))):
                module.register_parameter(name, misleading(weight, number))


def legacy_grouped(model: GPTModel | list[GPTModel], here: Topology) -> None:
    """All experts of a rank in two tensors, [hidden, experts * 2 ffn] and [experts * ffn, hidden].

    Their memory is that of one [in, out] matrix per expert, as `GroupedMLP.forward` views it.
    """
    for layer in layers_of(model):
        if hasattr(layer.mlp, "experts"):
            experts = layer.mlp.experts.local_experts
            up = torch.stack([expert.linear_fc1.weight.detach().T for expert in experts])
            down = torch.stack([expert.linear_fc2.weight.detach().T for expert in experts])
            hidden = up.shape[1]
            layer.mlp.experts = holding(weight1=up.reshape(hidden, -1), weight2=down.reshape(-1, hidden))


DIALECTS: dict[str, Callable] = {"transformer engine": transformer_engine, "legacy": legacy_grouped}


def load(source: Path) -> tuple[GPTModel | list[GPTModel], Topology]:
    """In a rank whose model parallelism has started: the model with its weights, and where this is."""
    config = read_json(source / "config.json")
    with current() as here:
        model = build_model(config, here, max_sequence_length=LENGTH)
        load_hf_weights(model, source, config, here)
    return model, here


def starting(sizes: dict) -> object:
    rest = {key: size for key, size in sizes.items() if key not in ("tp", "pp")}
    return started(sizes.get("tp", 1), sizes.get("pp", 1), "cpu", **rest)


def options_of(source: Path, form: str) -> dict:
    """Latent attention is quantized wherever it may be: what is held whole is then encoded too."""
    return FORMATS[form] if source.name.startswith("deepseek") else {}


def export(model: GPTModel | list[GPTModel], source: Path, out: Path, measured: dict[str, Tensor]) -> None:
    for form in FORMATS:
        options = options_of(source, form)
        export_hf_checkpoint(model, out / form, hf_model=source, format=form, calibration=measured, **options)


def export_local(source: Path, out: Path) -> dict[str, Tensor]:
    """In a rank alone: calibrate the model and export it as the local spec names it; returns the statistics."""
    with starting({}):
        model, _ = load(source)
        ids = load_file(source.parent / "ids" / "calibration.safetensors")["input_ids"]
        measured = calibrate(model, [ids[:4]], format="nvfp4_awq")
        export(model, source, out, measured)
        return measured


def export_other(source: Path, out: Path, sizes: dict, dialect: str, measured: dict[str, Tensor]) -> list[str]:
    """In a rank: export the model as another dialect names it; returns the names of that."""
    with starting(sizes):
        model, here = load(source)
        DIALECTS[dialect](model, here)
        export(model, source, out, measured)
        return sorted(name for layer in layers_of(model) for name, _ in layer.named_parameters())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with experts, and one whose latent attention makes its queries in one step."""
    folder = tmp_path_factory.mktemp("dialects")
    names = {name: name for name in ("qwen3_moe", "mixtral", "deepseek_v3")}
    found = {name: make_model(folder / name, name) for name in names}
    one_step = make_model(folder / "one", "deepseek_v3", q_lora_rank=None)
    return found | {"deepseek_v3 without q_lora": one_step}


@pytest.fixture(scope="module")
def local(
    sources: dict[str, Path], pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """By model, what one rank exports and measures with the local spec."""
    folders = {name: tmp_path_factory.mktemp(f"local {name}") for name in {case.values[0] for case in CASES}}
    return {n: (out, living(pool).call(1, export_local, sources[n], out)[0]) for n, out in folders.items()}


def fits(name: str, dialect: str, topology: str) -> bool:
    """Every model in every dialect under tensor and expert parallelism; the rest once."""
    if name.endswith("q_lora"):
        return dialect == "transformer engine" and topology == "tp2"
    return topology in ("tp2", "ep2") or (dialect, name) != ("legacy", "mixtral")


NORMED = find_spec("megatron.core.transformer.mla_qk_norm_config")  # Megatron-Core that norms queries made in one step
CASES = [
    pytest.param(name, dialect, topology, id=f"{name}-{dialect}-{topology}".replace(" ", "_"))
    for name in ("qwen3_moe", "mixtral", "deepseek_v3", *(() if NORMED else ("deepseek_v3 without q_lora",)))
    for dialect in DIALECTS
    for topology in TOPOLOGIES
    if fits(name, dialect, topology)
]


@pytest.mark.parametrize(("name", "dialect", "topology"), CASES)
def test_every_dialect_exports_the_bytes_of_the_local_spec(
    name: str, dialect: str, topology: str, sources: dict, local: dict, ranks: Ranks, tmp_path: Path
) -> None:
    world, sizes = TOPOLOGIES[topology]
    own_spec, measured = local[name]
    found = ranks.call(world, export_other, sources[name], tmp_path, sizes, dialect, measured)
    spoken = {name for names in found for name in names}
    own = {
        "transformer engine": {"mlp.experts.linear_fc1.weight0", "mlp.experts.linear_fc2.weight1"},
        "legacy": {"mlp.experts.weight1", "mlp.experts.weight2"},
    }
    assert own[dialect] <= spoken
    assert not any("local_experts" in found for found in spoken)
    for form in FORMATS:
        assert_same(tensors(tmp_path / form), tensors(own_spec / form))
    assert_same(tensors(tmp_path / "bf16"), tensors(sources[name]))


def wrong(model: GPTModel, here: Topology) -> None:
    """One parameter that no table has, one expert less on rank 1, and two of another size."""
    layer = model.decoder.layers[0]
    layer.self_attention.gate = holding(weight=torch.ones(4))
    layer.self_attention.linear_proj = holding(weight=torch.ones(64, 100, dtype=torch.bfloat16))
    model.decoder.layers[3].input_layernorm = holding(weight=torch.ones(60, dtype=torch.bfloat16))
    if here.rank == 1:
        del layer.mlp.experts.local_experts[1].linear_fc2


def refusal(source: Path, out: Path, sizes: dict) -> tuple[str, list[str]]:
    """In a rank: what an export says of a wrong model, and the functions that moved tensors."""
    with starting(sizes), ExitStack() as stack:
        model, here = load(source)
        wrong(model, here)
        homes = {"deliver": transport} | dict.fromkeys(("whole", "maximum", "total", "spread"), collectives)
        movers = {
            name: stack.enter_context(mock.patch.object(home, name, wraps=getattr(home, name)))
            for name, home in homes.items()
        }
        try:
            export_hf_checkpoint(model, out, hf_model=source, format="bf16")
        except ExportError as error:
            return str(error), [name for name, mover in movers.items() if mover.called]
    return "", []


@pytest.mark.parametrize("topology", ["ep2", "tp2 ep2"])
def test_all_that_is_wrong_with_a_model_is_said_at_once_on_every_rank_before_any_tensor_moves(
    topology: str, sources: dict, ranks: Ranks, tmp_path: Path
) -> None:
    world, sizes = TOPOLOGIES[topology]
    refusals = ranks.call(world, refusal, sources["qwen3_moe"], tmp_path / "out", sizes)
    (said, moved), *others = refusals
    assert others == [(said, moved)] * (world - 1)
    assert moved == []
    assert list(tmp_path.iterdir()) == []
    tp = sizes.get("tp", 1)
    expert = "decoder.layers.0.mlp.experts.{}.linear_fc2.weight"
    lost = f"the model has no parameter {expert.format(3)}, which config.json calls for"
    if tp == 2:  # ranks 0 and 1 hold halves of experts 0 and 1, and only rank 1's half is lost
        lost = f"{expert.format(1)} is (64, 24) on each of 1 ranks, but config.json means (64, 48) in all"
    problems = (
        lost,
        "the model has a parameter decoder.layers.0.self_attention.gate.weight that config.json does not call for",
        f"decoder.layers.0.self_attention.linear_proj.weight is (64, 100) on each of {tp} ranks, but config.json means "
        "(64, 128) in all",
        "decoder.layers.3.input_layernorm.weight is (60,) on each of",
    )
    assert [problem for problem in problems if said.count(problem) != 1] == [], said
    assert "failed to" not in said  # every rank found the same
