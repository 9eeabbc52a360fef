"""In a rank or beside them, what tests do with nvidia-modelopt: quantize a Megatron model, and export by ModelOpt's own routes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from megatron_export import export_hf_checkpoint
from megatron_export.mcore.cpu_compat import without_cuda
from megatron_export.mcore.model import shards_of
from megatron_export.models import parameters_of

from .live import batches, loaded
from .models import read_json
from .saving import PLACE, save


def _forward(source: Path, model: nn.Module) -> None:
    for ids in batches(source):
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        model(ids, torch.arange(ids.shape[1]).expand_as(ids), mask)


def recipe(name: str, cache: str | None) -> dict:
    """One of ModelOpt's recipes by name, with that of a KV cache."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.utils.core_utils import update_quant_cfg_with_kv_cache_quant

    found = getattr(mtq, name)
    return update_quant_cfg_with_kv_cache_quant(found, getattr(mtq, cache)["quant_cfg"]) if cache else found


def _complete_megatron() -> None:
    """ModelOpt's Megatron exporter imports a module that Megatron-Core 0.16 does not have, when ModelOpt is first imported."""
    name = "megatron.core.models.hybrid"
    if name not in sys.modules and find_spec(name) is None:
        made = ModuleType(f"{name}.hybrid_model")
        made.HybridModel = type("HybridModel", (nn.Module,), {})
        sys.modules |= {name: ModuleType(name), made.__name__: made}


def _attention_with_quantizers() -> None:
    """Let ModelOpt quantize the attention of Megatron's local spec as it does Transformer Engine's, which is not here."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
    from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer

    class QuantAttention(QuantModule):
        def _setup(self) -> None:
            self.q_bmm_quantizer, self.k_bmm_quantizer, self.v_bmm_quantizer = (TensorQuantizer() for _ in range(3))

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
            query, key = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key)
            return super().forward(query, key, self.v_bmm_quantizer(value), *args, **kwargs)

        def get_extra_state(self) -> None:
            """As Transformer Engine's has one, ModelOpt's own is asked for it."""

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
        ) -> dict:
            state = self.state_dict(prefix="", keep_vars=True)
            return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)

    if DotProductAttention not in QuantModuleRegistry:
        QuantModuleRegistry.register({DotProductAttention: "local_DotProductAttention"})(QuantAttention)


@contextmanager
def quantized(
    source: Path, tp: int, config: dict, finish: Callable[[nn.Module], None], ep: int = 1
) -> Iterator[nn.Module]:
    """In a rank: its part of a model, quantized by ModelOpt; `finish` may do more with it."""
    _complete_megatron()
    import modelopt.torch.quantization as mtq

    with loaded(source, tp, ep=ep) as (model, _):
        _attention_with_quantizers()
        with without_cuda(), torch.no_grad():
            model.eval()
            mtq.quantize(model, config, lambda model: _forward(source, model))
            finish(model)
        yield model


def state(model: nn.Module) -> dict[str, Tensor]:
    """The amaxes and vectors of this rank's quantizers."""
    kept = ("._amax", "._pre_quant_scale")
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(kept)}


def export_ours(
    source: Path, out: Path, tp: int, config: dict, finish: Callable[[nn.Module], None], asked: dict, ep: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In a rank: quantize with ModelOpt, export with ours; returns this rank's quantizers' state and shards."""
    with quantized(source, tp, config, finish, ep) as model:
        before = state(model)
        export_hf_checkpoint(model, out, hf_model=source, **asked)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
        return before, {name: shard.clone() for name, shard in shards_of(model).items()}


def adapt_and_save(source: Path, folder: Path, tp: int) -> None:
    """In a rank: put ModelOpt's LoRA adapters into a model, export it with ours, and save it with ModelOpt's state beside."""
    _complete_megatron()
    import modelopt.torch.peft as mtpf
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state

    every = {"rank": 8, "scale": 1.5, "enable": True}
    settings = {"adapter_type": "lora", "adapter_name": "tuned"}
    with loaded(source, tp) as (model, _), without_cuda(torch.device("cpu")):
        mtpf.update_model(model, settings | {"adapter_cfg": {"*": every, "*output_layer*": {"enable": False}}})
        torch.manual_seed(torch.distributed.get_rank())
        for name, weight in model.named_parameters():
            cut = ("linear_qkv.lora_b", "linear_fc1.lora_b", "linear_proj.lora_a", "linear_fc2.lora_a")
            if "lora_" in name:
                weight.data.normal_(std=0.1)
                if not any(one in name for one in cut):
                    torch.distributed.broadcast(weight.data, 0)
        export_hf_checkpoint(model, folder / "live", hf_model=source, format="bf16", merge_lora=True)
        save(model, folder / "saved", read_json(source / "config.json"))
        save_sharded_modelopt_state([model], str(folder / "saved" / PLACE))


def export_and_save(
    source: Path, folder: Path, tp: int, config: dict, finish: Callable[[nn.Module], None], asked: dict, ep: int = 1
) -> None:
    """In a rank: quantize with ModelOpt, export with ours, and save as Megatron-LM does with ModelOpt's state beside."""
    with quantized(source, tp, config, finish, ep) as model:
        from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state

        export_hf_checkpoint(model, folder / "live", hf_model=source, **asked)
        save(model, folder / "saved", read_json(source / "config.json"))
        with without_cuda(torch.device("cpu")):
            save_sharded_modelopt_state([model], str(folder / "saved" / PLACE))


def export_megatron_route(source: Path, out: Path, tp: int, config: dict) -> None:
    """In a rank: quantize and export with ModelOpt's own Megatron exporter."""
    with quantized(source, tp, config, keep) as model:
        from modelopt.torch.export.unified_export_megatron import export_mcore_gpt_to_hf

        with without_cuda():
            export_mcore_gpt_to_hf(model, str(source), dtype=torch.bfloat16, export_dir=str(out))


def whole_weights(config: dict, shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """HF name -> whole tensor, from the shards of all tensor-parallel ranks."""
    found = {}
    for name, source in parameters_of(config).items():
        parts = [source.layout.split(rank[name], index, len(shards)) for index, rank in enumerate(shards)]
        for part, hf in source.names().items():
            held = [split[part] for split in parts]
            found[hf] = torch.cat(held, dim=("out", "in").index(source.cut.value)) if source.cut else held[0]
    return found


def export_hf_route(source: Path, out: Path, config: dict, states: list[dict[str, Tensor]], shards: list) -> None:
    """ModelOpt's export of transformers' model, with the weights and quantizers' state of the Megatron model's ranks."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint as export
    from modelopt.torch.quantization.model_calib import max_calibrate
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, attn_implementation="eager")
    plain = config | {"algorithm": "max"}  # what a search found is copied below
    mtq.quantize(model, plain, lambda model: [model(ids) for ids in batches(source)])
    for name, tensor in whole_weights(read_json(source / "config.json"), shards).items():
        model.get_parameter(name).data.copy_(tensor)
    fused = {"linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_proj": ("o_proj",)}
    fused |= {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}
    for name in states[0]:
        _, _, layer, block, *middle, quantizer, leaf = name.split(".")
        if quantizer.isdigit():
            quantizer = f"{middle.pop()}.{quantizer}"
        owner = f"model.layers.{layer}.{'self_attn' if block == 'self_attention' else block}"
        held = [state[name] for state in states]
        if leaf == "_pre_quant_scale" and middle[0] in ("linear_proj", "linear_fc2"):
            held = [torch.cat(held)]
        for part in fused.get(middle[0], ("",)):
            target = model.get_submodule(f"{owner}.{part}.{quantizer}".replace("..", "."))
            if leaf == "_pre_quant_scale":
                target.pre_quant_scale = held[0]
            elif held[0].numel() == 1:
                target.amax = held[0]
            else:  # amaxes of blocks: of the weights as they are now
                weight = model.get_submodule(f"{owner}.{part}").weight
                target.reset_amax()
                max_calibrate(target, lambda quantizer, weight=weight: quantizer(weight), distributed_sync=False)
    export(model, export_dir=out)


def keep(model: nn.Module) -> None:
    """Nothing more is done with a model."""


def train(model: nn.Module) -> None:
    """As a few steps of training do: weights move, amaxes stay."""
    for name, weight in model.named_parameters():
        if ".linear_" in name:
            noise = torch.linspace(-1, 1, weight.numel()).view_as(weight) * weight.std() / 2
            weight.data.copy_((weight.float() + noise).to(weight.dtype))


def smooth(model: nn.Module) -> None:
    """As ModelOpt's AWQ search ends, which needs a GPU for NVFP4: other weights, with vectors that undo it."""
    from modelopt.torch.quantization.model_calib import max_calibrate

    for module in model.modules():
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled:
            scale = torch.linspace(0.5, 2, module.weight.shape[1]).to(torch.bfloat16)
            module.weight.data.copy_((module.weight.float() / scale.float()).to(torch.bfloat16))
            module.input_quantizer.pre_quant_scale = scale
            module.weight_quantizer.reset_amax()
            max_calibrate(module.weight_quantizer, lambda q, module=module: q(module.weight))
