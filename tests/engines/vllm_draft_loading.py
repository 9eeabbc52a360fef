"""Drafts loaded by a real vLLM on a CPU beside a base, each twice: into memory of zeros and of ones; a JSON line about each.

    python -m tests.engines.vllm_draft_loading BASE DRAFT...

What differs between the two was never loaded, but for an embedding or output layer that vLLM then takes from the base. Configs,
names, shapes and joined loading are vLLM's own; weights are not made ready for a kernel, and nothing is computed.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from launch.bench.vllm_process import HOW, SETTINGS, SHORT, emulate

if TYPE_CHECKING:
    import torch

DEFAULTS = ("q_scale", "k_scale", "v_scale", "prob_scale")  # are 1 where a draft has none
SHARED = {"model.embed_tokens.weight": "has_own_embed_tokens", "lm_head.weight": "has_own_lm_head"}


def configured(draft: Path, base: Path) -> Any:
    """vLLM's settings for a base with a draft."""
    from vllm.engine.arg_utils import EngineArgs

    medusa = json.loads((draft / "config.json").read_text()).get("model_type") == "medusa"
    drafting = {"method": "medusa" if medusa else "eagle3", "model": str(draft), "num_speculative_tokens": 2}
    arguments = EngineArgs(model=str(base), max_model_len=SHORT, speculative_config=drafting, **HOW)
    return arguments.create_engine_config()


def loaded(draft: Path, base: Path, byte: int) -> tuple[dict[str, "torch.Tensor"], Any]:
    """The bytes of all parameters, loaded into memory that is full of one, and the model. Raises what vLLM raises."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = configured(draft, base)
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not torch.distributed.is_initialized():
            parallel_state.init_distributed_environment(1, 0, f"file://{mkdtemp()}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        try:
            of_draft = config.speculative_config.draft_model_config
            model = initialize_model(vllm_config=config, model_config=of_draft)
            for parameter in model.parameters():
                filling = torch.full((parameter.numel() * parameter.element_size(),), byte, dtype=torch.uint8)
                parameter.data.copy_(filling.view(parameter.dtype).view(parameter.shape))
            get_model_loader(config.load_config).load_weights(model, of_draft)
        finally:
            parallel_state.destroy_model_parallel()
    return {name: one.data.contiguous().view(-1).view(torch.uint8) for name, one in model.named_parameters()}, model


def tried(draft: Path, base: Path) -> dict:
    """What became of a draft: an `error`, and parameters that were neither filled nor are taken from the base (`lacking`)."""
    try:
        (zeros, model), (ones, _) = loaded(draft, base, 0), loaded(draft, base, 255)
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is its verdict
        return {"folder": str(draft), "error": f"{type(error).__name__}: {error}"[:300], "lacking": []}
    unequal = [name for name in zeros if not zeros[name].equal(ones[name])]
    lacking = [name for name in unequal if not name.endswith(DEFAULTS)]
    shared = [name for name in lacking if name in SHARED and not vars(model).get(SHARED[name], False)]
    return {"folder": str(draft), "error": None, "lacking": [name for name in lacking if name not in shared]}


def main(base: str, drafts: list[str]) -> None:
    """Try every draft."""
    emulate()
    for draft in drafts:
        print(json.dumps(tried(Path(draft), Path(base))), flush=True)


if __name__ == "__main__":
    os.environ |= SETTINGS
    main(sys.argv[1], sys.argv[2:])
