"""Trains an EAGLE-3 draft for a HuggingFace model on the running Python's standard library, and writes its folder.

    python examples/train_draft.py --base examples/model --minutes 5 --output DIR

The base is frozen and read through transformers; the draft is plain torch. For every place of a text the draft is asked for the
next tokens as an engine would ask for them: first from hidden states of the base, then from what it made itself, STEPS in all. It
learns the base's probabilities of the tokens that it knows, the most frequent ones of the text. The folder has the tensors and
the config.json that an export of such a draft has.
"""

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_export.models import parameters_of
from megatron_export.models.eagle3 import eagle3_config
from megatron_export.models.sources import expected_shapes

WINDOW, STEPS, REPORT_SECONDS = 256, 4, 10
SUFFIXES = (".py", ".rst", ".txt")


class Draft(nn.Module):
    """One layer of a Llama, whose attention reads an embedding beside a hidden state. Its modules are called as in the folder."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config, hidden, ffn = config, config["hidden_size"], config["intermediate_size"]
        q_rows, kv_rows = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
        sizes = {
            "fc": (config["num_aux_hidden_states"] * hidden, hidden),
            "self_attn_q_proj": (2 * hidden, q_rows),
            "self_attn_k_proj": (2 * hidden, kv_rows),
            "self_attn_v_proj": (2 * hidden, kv_rows),
            "self_attn_o_proj": (q_rows, hidden),
            "mlp_gate_proj": (hidden, ffn),
            "mlp_up_proj": (hidden, ffn),
            "mlp_down_proj": (ffn, hidden),
            "lm_head": (hidden, config["draft_vocab_size"]),
        }
        self.linears = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm", "norm")
        self.norms = nn.ParameterDict({name: nn.Parameter(torch.ones(hidden)) for name in norms})

    def normed(self, name: str, values: Tensor) -> Tensor:
        return functional.rms_norm(values.float(), values.shape[-1:], self.norms[name], self.config["rms_norm_eps"])

    def heads(self, name: str, read: Tensor, places: Tensor) -> Tensor:
        """Queries, keys or values [batch, heads, tokens, head_dim]; queries and keys are rotated."""
        values = (
            self.linears[f"self_attn_{name}_proj"](read).unflatten(-1, (-1, self.config["head_dim"])).transpose(1, 2)
        )
        groups = self.config["num_attention_heads"] // values.shape[1]
        return (values if name == "v" else self.rotated(values, places)).repeat_interleave(groups, dim=1)

    def rotated(self, values: Tensor, places: Tensor) -> Tensor:
        size = self.config["head_dim"]
        speeds = self.config["rope_theta"] ** (-torch.arange(0, size, 2, device=values.device) / size)
        angles = torch.outer(places.float(), speeds).repeat(1, 2)
        first, second = values.chunk(2, dim=-1)
        return values * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def forward(self, embeddings: list[Tensor], states: Tensor) -> Iterator[Tensor]:
        """The logits [batch, places, known tokens] of each step. `embeddings` are those of the token that each step reads, `states`
        the joined hidden states of the base [batch, places, n hidden].

        At a step, a place sees what places up to it made of the base's states, and what it made itself at steps before.
        """
        hidden, count = self.linears["fc"](states), states.shape[1]
        unseen = torch.ones(count, count, dtype=torch.bool, device=states.device).triu(1)
        made: list[tuple[Tensor, Tensor]] = []
        for step, embedding in enumerate(embeddings):
            read = torch.cat([self.normed("input_layernorm", embedding), self.normed("hidden_norm", hidden)], dim=-1)
            places = torch.arange(count, device=states.device) + step
            q, k, v = (self.heads(name, read, places) for name in "qkv")
            made.append((k, v))
            scores = [(q @ made[0][0].transpose(-1, -2)).masked_fill(unseen, -math.inf)]
            scores += [(q * k).sum(-1, keepdim=True) for k, _ in made[1:]]
            shares = (torch.cat(scores, dim=-1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
            seen = shares[..., :count] @ made[0][1]
            for number, (_, v) in enumerate(made[1:]):
                seen = seen + shares[..., count + number, None] * v
            hidden = hidden + self.linears["self_attn_o_proj"](seen.transpose(1, 2).flatten(-2))
            inner = self.normed("post_attention_layernorm", hidden)
            gate, up = (self.linears[f"mlp_{name}_proj"](inner) for name in ("gate", "up"))
            hidden = hidden + self.linears["mlp_down_proj"](functional.silu(gate) * up)
            yield self.linears["lm_head"](self.normed("norm", hidden))

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names of the folder."""
        found = {name: linear.weight for name, linear in self.linears.items()} | dict(self.norms)
        named = {}
        for name, weight in found.items():
            block = next((block for block in ("self_attn", "mlp") if name.startswith(f"{block}_")), "")
            inner = name.replace(f"{block}_", f"{block}.", 1) if block else name
            prefix = "" if name in ("fc", "lm_head", "norm") else "layers.0."
            named[f"{prefix}{inner}.weight"] = weight.detach().bfloat16().contiguous().cpu()
        return named


def main() -> None:
    """Text, the tokens that the draft knows, training, the folder."""
    flags = parse_flags()
    device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(flags.seed)
    base = (
        AutoModelForCausalLM.from_pretrained(flags.base, dtype=torch.bfloat16).to(device).eval().requires_grad_(False)
    )
    tokens = text_tokens(flags).to(device)
    settings = json.loads((flags.base / "config.json").read_text())
    config = eagle3_config(settings, sizes(settings, flags))
    known = (
        torch.bincount(tokens, minlength=config["vocab_size"]).topk(config["draft_vocab_size"]).indices.sort().values
    )
    draft = Draft(config).to(device)
    print(
        f"{len(tokens):,} tokens, {torch.isin(tokens, known).float().mean():.1%} of them known to the draft", flush=True
    )
    train(draft, base, tokens, known, flags)
    save(draft, known, config, flags.output)


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the model that the draft is for")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new")
    library = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--library", type=Path, default=library, help="to learn from; default: this Python's own")
    parser.add_argument("--minutes", type=float, default=5.0, help="time to train for")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--batch-size", type=int, default=64, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2], help="of the base, whose outputs are read")
    parser.add_argument("--known", type=int, default=768, help="tokens that the draft knows")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def sizes(base: dict, flags: argparse.Namespace) -> dict:
    """The draft's own settings, in words of config.json."""
    return {
        "num_hidden_layers": 1,
        "hidden_size": base["hidden_size"],
        "intermediate_size": flags.ffn,
        "num_attention_heads": flags.heads,
        "num_key_value_heads": max(1, flags.heads // 2),
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "draft_vocab_size": flags.known,
        "eagle_aux_hidden_state_layer_ids": sorted(flags.layers),
    }


def text_tokens(flags: argparse.Namespace) -> Tensor:
    """The tokens of all texts of the library, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(flags.base)
    found = (
        path
        for path in sorted(flags.library.rglob("*"))
        if path.suffix in SUFFIXES and "site-packages" not in path.parts
    )
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in found if path.is_file()]
    return torch.cat([torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if ids])


def train(draft: Draft, base: nn.Module, tokens: Tensor, known: Tensor, flags: argparse.Namespace) -> None:
    """Until the time is up. The draft's weights are float32 and compute in bfloat16; the learning rate follows the clock."""
    optimizer = torch.optim.AdamW(draft.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    started = reported = time.monotonic()
    offsets, progress, steps = torch.arange(WINDOW + STEPS, device=tokens.device), 0.0, 0
    while progress < 1:
        starts = torch.randint(len(tokens) - WINDOW - STEPS, (flags.batch_size, 1), device=tokens.device)
        losses, right = step_losses(draft, base, tokens[starts + offsets], known)
        for group in optimizer.param_groups:
            group["lr"] = flags.learning_rate * min(progress / 0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        losses.mean().backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, progress = steps + 1, (time.monotonic() - started) / (flags.minutes * 60)
        if progress >= 1 or time.monotonic() - reported > REPORT_SECONDS:
            reported, shares = time.monotonic(), ", ".join(f"{share:.3f}" for share in right.tolist())
            print(f"{reported - started:6.0f} s  step {steps:6}  loss {losses.mean():.4f}  right {shares}", flush=True)


def step_losses(draft: Draft, base: nn.Module, window: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Of each step, the cross entropy with the base's probabilities of the known tokens, and how often the draft's first choice is
    the base's of all tokens.
    """
    with torch.no_grad():
        said = base(window, output_hidden_states=True)
        ids = draft.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        states = torch.cat([said.hidden_states[number + 1][:, :WINDOW] for number in ids], dim=-1)
        embedded = base.get_input_embeddings()(window)
    losses, right = [], []
    count = WINDOW - 1
    embeddings = [embedded[:, step + 1 : step + 1 + count] for step in range(STEPS)]
    with torch.autocast(window.device.type, torch.bfloat16):
        made = list(draft(embeddings, states[:, :count]))
    for step, logits in enumerate(made):
        theirs = said.logits[:, step + 1 : step + 1 + count].float()
        shares = theirs[..., known].softmax(dim=-1)
        losses.append(-(shares * logits.float().log_softmax(dim=-1)).sum(-1).mean())
        right.append((known[logits.argmax(-1)] == theirs.argmax(-1)).float().mean())
    return torch.stack(losses), torch.stack(right)


def save(draft: Draft, known: Tensor, config: dict, folder: Path) -> None:
    """Write the draft's folder."""
    tensors = draft.tensors() | {"d2t": (known.cpu() - torch.arange(len(known)))}
    wanted = expected_shapes(parameters_of(config).values())
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
        raise SystemExit("the draft has other tensors than an export of it would have")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{folder}: {sum(tensor.nbytes for tensor in tensors.values()):,} bytes")


if __name__ == "__main__":
    main()
