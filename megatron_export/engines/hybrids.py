"""Linears that engines take apart: input projections of linear attention (Qwen3-Next, Qwen 3.5) and of Mamba (Nemotron-H), and what
Phi 3 joins. And the heads of such layers.
"""

from .checkpoint_view import CheckpointView

NEXT, NEMOTRON = "Qwen3NextForCausalLM", "NemotronHForCausalLM"
QWEN35_SEES = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
QWEN35_TEXT = ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
QWEN35 = (*QWEN35_TEXT, *QWEN35_SEES)


def rows_of_parts(checkpoint: CheckpointView, name: str) -> tuple[int, ...]:
    """The rows of each part of an HF linear that is an input projection of linear attention or Mamba, or that joins q, k and v,
    or gate and up; () for any other.
    """
    if ".experts." in name:
        return ()
    keys = checkpoint.number("linear_num_key_heads") * checkpoint.number("linear_key_head_dim")
    values = checkpoint.number("linear_num_value_heads") * checkpoint.number("linear_value_head_dim")
    inner = checkpoint.number("mamba_num_heads") * checkpoint.number("mamba_head_dim")
    states = checkpoint.number("n_groups") * checkpoint.number("ssm_state_size")
    heads, groups = checkpoint.number("num_attention_heads"), checkpoint.number("num_key_value_heads")
    width = checkpoint.number("head_dim") or checkpoint.number("hidden_size") // max(heads, 1)
    parts = {
        "qkv_proj": (heads * width, groups * width, groups * width),
        "gate_up_proj": (checkpoint.number("intermediate_size"),) * 2,
        "in_proj_qkv": (keys, keys, values),
        "in_proj_z": (values,),
        "in_proj_qkvz": (keys, keys, values, values),
        "in_proj": (inner, inner, states, states, checkpoint.number("mamba_num_heads")),
    }
    return parts.get(name.rpartition(".")[2], ())


def states_fit(checkpoint: CheckpointView, tp: int) -> bool:
    """Whether `tp` GPUs can have as many heads each of linear attention, and of Mamba whole groups of them, or copies of one."""
    keys = ("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads")
    groups = checkpoint.number("n_groups") if checkpoint.number("mamba_num_heads") else 0
    return all(checkpoint.number(key) % tp == 0 for key in keys) and (groups == 1 or groups % tp == 0)
