"""Layers that predict one more token, put into small checkpoints: like layers that they have, with other numbers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .models import read_json, tensors

BLOCKS = ("full_attention", "moe")  # of Nemotron 3


def add_qwens(source: Path) -> None:
    """Give Qwen3-Next or Qwen 3.5 a layer under `mtp.`, like its last one."""
    config, held = read_json(source / "config.json"), tensors(source)
    text = config.get("text_config", config)
    prefix = "model.language_model." if "text_config" in config else "model."
    last, hidden = f"{prefix}layers.{text['num_hidden_layers'] - 1}.", text["hidden_size"]
    made = {f"mtp.layers.0.{n.removeprefix(last)}": t.flip(0) for n, t in held.items() if n.startswith(last)}
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    made |= {f"mtp.{norm}.weight": torch.rand(hidden).bfloat16() for norm in norms}
    made["mtp.fc.weight"] = (torch.randn(hidden, 2 * hidden) / 10).bfloat16()
    text["mtp_num_hidden_layers"] = 1
    _replace(source, config, held | made)


def add_nemotrons(source: Path) -> None:
    """Give Nemotron 3 two blocks that predict one more token together."""
    config, held = read_json(source / "config.json"), tensors(source)
    kinds, hidden, made = config["layers_block_type"], config["hidden_size"], {}
    for number, kind in enumerate(BLOCKS):
        like = f"backbone.layers.{kinds.index(kind)}."
        made |= {
            f"mtp.layers.{number}.{n.removeprefix(like)}": t.flip(0) for n, t in held.items() if n.startswith(like)
        }
    for norm in ("0.enorm", "0.hnorm", "1.final_layernorm"):
        made[f"mtp.layers.{norm}.weight"] = torch.rand(hidden).bfloat16()
    made["mtp.layers.0.eh_proj.weight"] = (torch.randn(hidden, 2 * hidden) / 10).bfloat16()
    config |= {"num_nextn_predict_layers": 1, "mtp_layers_block_type": list(BLOCKS)}
    _replace(source, config, held | made)


def _replace(source: Path, config: dict, held: dict[str, Tensor]) -> None:
    for path in source.glob("*.safetensors"):
        path.unlink()
    save_file({name: tensor.clone() for name, tensor in held.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
