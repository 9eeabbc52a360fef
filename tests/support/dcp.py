"""Checkpoints that torch.distributed.checkpoint saves of transformers models which ranks share: FSDP2, and DTensors on a mesh."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from .models import tensors


def trained_under_fsdp2(source: Path, folder: Path) -> None:
    """In a rank: a step of AdamW on the model of an HF folder in float32, then `{"model", "optim"}` as accelerate and others save
    it. The learning rate is 0, so the weights stay what they are.
    """
    dist.init_process_group("gloo")
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        model(torch.arange(8)[None]).logits.sum().backward()
        optimizer.step()
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": moments, "step": 1}, checkpoint_id=folder)
    finally:
        dist.destroy_process_group()


def spread(source: Path, folder: Path, compiled: str = "") -> None:
    """In four ranks: the tensors of an HF folder at the top, cut by tensor parallelism and then by FSDP, beside the rest of a
    trainer; `compiled` stands in the names.
    """
    dist.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        whole = {name.replace("layers.", f"layers.{compiled}"): one for name, one in sorted(tensors(source).items())}
        state: dict[str, object] = {name: _cut(name, tensor, mesh) for name, tensor in whole.items()}
        moments = {f"{name}.exp_avg": torch.zeros_like(one) for name, one in list(state.items())[:4]}
        dcp.save(
            state | {"optimizer": {"state": moments}, "train_state": {"step": torch.tensor(3)}}, checkpoint_id=folder
        )
    finally:
        dist.destroy_process_group()


def _cut(name: str, tensor: Tensor, mesh: dist.DeviceMesh) -> DTensor:
    if tensor.dim() == 1:
        return distribute_tensor(tensor, mesh, (Shard(0), Replicate()))
    return distribute_tensor(
        tensor, mesh, (Shard(0), Shard(1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0))
    )
