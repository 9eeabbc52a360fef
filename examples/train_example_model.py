"""Trains the example model with Megatron-Core on the running Python's standard library, and exports it in bfloat16.

    torchrun --nproc-per-node 1 examples/train_example_model.py --minutes 7 --output DIR

Files are ordered by the hash of their text, which drops exact copies and makes the split the same wherever the library
is the same. The first files give the held-out text, the next the calibration text, and the rest train: what is left of
a file after its excerpt is used nowhere. The learning rate follows the clock, so `--minutes` decides and not a number
of steps. Export is tried once before training, so that a mistake costs seconds.
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from megatron_export import export_hf_checkpoint
from megatron_export.common.errors import ExportError
from megatron_export.mcore import parallel_state
from megatron_export.mcore.build import build_model
from megatron_export.mcore.cpu_compat import without_cuda

END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
KEPT = ("batch_size", "learning_rate", "dropout", "gain_spread", "seed")  # flags that training.json has
WINDOW = 512
EXCERPT_BYTES, HELDOUT_BYTES, CALIBRATION_BYTES = 12_000, 250_000, 400_000
WARMUP, REPORT_SECONDS = 0.02, 10
CONFIG = json.loads((Path(__file__).parent / "model" / "config.json").read_text())


def main() -> None:
    """Corpus, tokenizer, training, export."""
    flags = parse_flags()
    if flags.output.exists() and any(flags.output.iterdir()):
        raise SystemExit(f"{flags.output} is not empty. Name a new folder")
    texts = corpus(flags.library)
    heldout, calibration = take(texts, HELDOUT_BYTES), take(texts, CALIBRATION_BYTES)
    tokenizer = train_tokenizer(texts)
    with (
        tempfile.TemporaryDirectory() as staging,
        parallel_state.started(1, 1, flags.device),
        parallel_state.current() as here,
    ):
        if here.world > 1:
            raise ExportError(f"{here.world} processes would each train alone. Use torchrun --nproc-per-node 1")
        source = write_source(Path(staging) / "source", tokenizer)
        torch.manual_seed(flags.seed)
        with without_cuda():
            model = build_model(CONFIG, here, max_sequence_length=WINDOW, initialize=True)
        export_hf_checkpoint(model, Path(staging) / "trial", hf_model=source, format="bf16")
        train_tokens = token_ids(tokenizer, texts).to(here.device)
        heldout_tokens = torch.tensor(tokenizer.encode(heldout).ids, device=here.device)
        print(f"{len(texts)} files, {len(train_tokens):,} tokens; held out {len(heldout_tokens):,}", flush=True)
        prepare(model, flags)
        untrained = perplexity(model, heldout_tokens)
        trained = train(model, train_tokens, flags)
        export_hf_checkpoint(model, flags.output, hf_model=source, format="bf16")
        (flags.output / "heldout.txt").write_text(heldout, encoding="utf-8")
        (flags.output / "calibration.txt").write_text(calibration, encoding="utf-8")
        numbers = {
            "untrained_perplexity": round(untrained, 3),
            "heldout_perplexity": round(perplexity(model, heldout_tokens), 4),
            "heldout_tokens": len(heldout_tokens),
            "corpus_tokens": len(train_tokens),
            **trained,
            **{name: getattr(flags, name) for name in KEPT},
            "device": here.device.type,
            "python": platform.python_version(),
            **{name.replace("-", "_"): version(name) for name in ("torch", "megatron-core")},
        }
    (flags.output / "training.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers, indent=2))


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new or empty")
    library = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--library", type=Path, default=library, help="to learn from; default: this Python's own")
    parser.add_argument("--minutes", type=float, default=7.0, help="time to train for, without set-up and export")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--batch-size", type=int, default=128, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the highest one, after warm-up")
    parser.add_argument("--dropout", type=float, default=0.1, help="of what each layer adds, and of the embeddings")
    parser.add_argument("--gain-spread", type=float, default=1.0, help="sigma of the log of the norms' first gains")
    parser.add_argument("--seed", type=int, default=1234, help="of the data's order; on the CPU, of the weights too")
    return parser.parse_args()


def corpus(root: Path) -> list[str]:
    """The library's sources and documentation, each text once, ordered by hash."""
    texts = {}
    for path in root.rglob("*"):
        text = read(path) if wanted(path.relative_to(root)) else ""
        texts[hashlib.sha256(text.encode()).hexdigest()] = text
    return [texts[digest] for digest in sorted(texts) if texts[digest]]


def wanted(path: Path) -> bool:
    """Whether a file of the library is text to learn from; `_sysconfigdata` differs from machine to machine."""
    if {"site-packages", "dist-packages"} & set(path.parts) or path.name.startswith("_sysconfigdata"):
        return False
    return path.suffix == ".py" or (path.suffix in (".rst", ".txt") and "test" not in path.parts)


def read(path: Path) -> str:
    """The text of a file, or nothing for the test data that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def take(texts: list[str], budget: int) -> str:
    """Remove files from the front of `texts` until their first lines fill `budget` bytes; returns those lines."""
    parts, size = [], 0
    while size < budget:
        parts.append(head(texts.pop(0), EXCERPT_BYTES))
        size += len(parts[-1].encode())
    return head("".join(parts), budget)


def head(text: str, size: int) -> str:
    """The first whole lines of `text`, at most `size` bytes in UTF-8."""
    start = text.encode()[:size]
    return start[: start.rfind(b"\n") + 1].decode()


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with as many entries as the model has; `END` is entry 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    size, alphabet = CONFIG["vocab_size"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """The tokens of all texts, with `END` after each."""
    end = [tokenizer.token_to_id(END)]
    return torch.cat([torch.tensor(encoding.ids + end) for encoding in tokenizer.encode_batch_fast(texts)])


def write_source(folder: Path, tokenizer: Tokenizer) -> Path:
    """The files that the export copies or reads: config, generation config and tokenizer."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # transformers 4 and 5
    settings.write_text(json.dumps(named, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    generation = {key: CONFIG[key] for key in ("eos_token_id", "pad_token_id")} | {"do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return folder


def train(model: nn.Module, tokens: Tensor, flags: argparse.Namespace) -> dict:
    """Train until the time is up. The model computes in bfloat16; the optimizer holds its weights in float32."""
    weights = list(model.parameters())
    masters = [weight.detach().float().requires_grad_() for weight in weights]
    matrices, vectors = ([master for master in masters if (master.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    started = reported = time.monotonic()
    steps, losses = 0, []
    model.train()
    for steps, window in enumerate(windows(tokens, flags), 1):
        progress = (time.monotonic() - started) / (flags.minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = flags.learning_rate * rate(progress)
        loss = token_losses(model, window).mean()
        loss.backward()
        step(optimizer, weights, masters)
        losses.append(loss.detach())
        if progress < 1 and time.monotonic() - reported < REPORT_SECONDS:
            continue
        mean = torch.stack(losses).mean().item()  # waits for the device, so it comes before the clock is read
        reported, losses = time.monotonic(), []
        seconds = reported - started
        speed = steps * flags.batch_size * WINDOW / seconds
        print(f"{seconds:6.0f} s  step {steps:6}  loss {mean:.4f}  {speed:,.0f} tokens/s", flush=True)
        if progress >= 1:
            break
    return {"tokens": steps * flags.batch_size * WINDOW, "steps": steps, "seconds": round(seconds, 1)}


@torch.no_grad()
def prepare(model: nn.Module, flags: argparse.Namespace) -> None:
    """Dropout, which the exporter builds models without, and uneven channels, as large models have.

    The gains of the norms before q, k, v and gate, up start log-normal. Training keeps much of that, so that some
    input channels of these linears matter more than others; without it a model this small has nothing that AWQ could
    find.
    """
    generator = torch.Generator().manual_seed(flags.seed)
    model.embedding.embedding_dropout.p = flags.dropout
    for layer in model.decoder.layers:
        layer.hidden_dropout = flags.dropout
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            norm.weight.copy_((torch.randn(norm.weight.shape, generator=generator) * flags.gain_spread).exp())


def windows(tokens: Tensor, flags: argparse.Namespace) -> Iterator[Tensor]:
    """Endless batches [batch, WINDOW + 1] from random places of the corpus."""
    generator = torch.Generator(tokens.device).manual_seed(flags.seed)
    offsets = torch.arange(WINDOW + 1, device=tokens.device)
    while True:
        places = (flags.batch_size, 1)
        starts = torch.randint(len(tokens) - WINDOW, places, generator=generator, device=tokens.device)
        yield tokens[starts + offsets]


def rate(progress: float) -> float:
    """The share of the highest learning rate: linear warm-up, then a cosine to zero."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 + 0.5 * math.cos(math.pi * min((progress - WARMUP) / (1 - WARMUP), 1.0))


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer, weights: list[Tensor], masters: list[Tensor]) -> None:
    """One update of the float32 weights from the bfloat16 gradients, copied back to the model."""
    for weight, master in zip(weights, masters, strict=True):
        master.grad, weight.grad = weight.grad.float(), None
    nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    for weight, master in zip(weights, masters, strict=True):
        weight.copy_(master)


def token_losses(model: nn.Module, window: Tensor) -> Tensor:
    """Negative log-likelihoods [batch, tokens - 1] of a window's tokens after the first."""
    ids, labels = window[:, :-1], window[:, 1:]
    size = ids.shape[1]
    positions = torch.arange(size, device=ids.device).expand_as(ids)
    hidden = torch.ones(1, 1, size, size, dtype=torch.bool, device=ids.device).triu(1)  # True: not attended to
    with without_cuda():
        return model(ids, positions, hidden, labels=labels)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """Over windows of `WINDOW` tokens, each scored from its second token, as launch/benchmark.py does."""
    model.eval()
    whole = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = torch.cat([token_losses(model, batch).float() for batch in whole.split(16)])
    return math.exp(losses.mean().item())


if __name__ == "__main__":
    main()
