"""Trains a small model with Megatron-Core under tensor parallelism, and exports it quantized from inside the loop.

    torchrun --nproc-per-node 2 examples/export_from_training.py --output DIR

It runs on GPUs (NCCL) or, where there are none, on the CPU (gloo). `export` is all that `megatron_export` adds;
the rest is what a training script has anyway. Megatron's optimizer needs CUDA, so AdamW updates float32 copies of
the weights.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn
from transformers import AutoTokenizer

from megatron_export import calibrate, export_hf_checkpoint
from megatron_export.mcore.cpu_compat import without_cuda

HF_MODEL = Path(__file__).parent / "model"  # gives config.json and the tokenizer; its weights are not read
MICRO_BATCHES, MICRO_BATCH, WINDOW = 2, 4, 128
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if GPU else torch.device("cpu")


def export(model: nn.Module, samples: list[Tensor], folder: Path, form: str) -> None:
    """Every rank calls this with the model as it trains, sharded and wrapped; it is left exactly as it was."""
    calibration = calibrate(model, samples, format=form)
    report = export_hf_checkpoint(model, folder, hf_model=HF_MODEL, format=form, calibration=calibration)
    say(f"exported {report.plan.nbytes:,} bytes to {folder} in {report.seconds:.1f} s; training goes on")


def main() -> None:
    """An ordinary training loop around Megatron's schedule, with an export in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the exported checkpoint")
    parser.add_argument("--format", choices=("fp8", "nvfp4", "bf16"), default="fp8")
    parser.add_argument("--steps", type=int, default=10, help="steps to train (default: 10)")
    parser.add_argument("--export-at", type=int, default=5, help="the step after which to export (default: 5)")
    flags = parser.parse_args()
    if GPU:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if GPU else "gloo")
    with without_cuda():  # does nothing where there are GPUs
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        model = build()
        weights = list(model.parameters())
        masters = [weight.detach().float() for weight in weights]
        optimizer = torch.optim.AdamW(masters, lr=1e-3)
        data = windows()
        samples = [next(data)[:, :-1] for _ in range(8)]  # to calibrate with
        for step in range(1, flags.steps + 1):
            model.zero_grad_buffer()
            losses = get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=data, model=[model],
                num_microbatches=MICRO_BATCHES, micro_batch_size=MICRO_BATCH, seq_length=WINDOW,
            )  # fmt: skip
            for weight, master in zip(weights, masters, strict=True):
                master.grad = weight.main_grad
            optimizer.step()
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master)
            say(f"step {step} loss {sum(losses) / len(losses):.4f}")
            if step == flags.export_at:
                export(model, samples, flags.output, flags.format)
    dist.destroy_process_group()


def build() -> DistributedDataParallel:
    """The model that HF_MODEL/config.json describes, with random weights."""
    torch.manual_seed(1234)
    if GPU:
        model_parallel_cuda_manual_seed(1234)
    config = TransformerConfig(
        num_layers=4, hidden_size=256, ffn_hidden_size=1024,
        num_attention_heads=8, num_query_groups=4, kv_channels=64, qk_layernorm=True,
        normalization="RMSNorm", layernorm_epsilon=1e-6,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        masked_softmax_fusion=False, use_cpu_initialization=not GPU,
        tensor_model_parallel_size=2, params_dtype=torch.bfloat16, bf16=True,
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    rope = {"position_embedding_type": "rope", "rotary_base": 10000}
    model = GPTModel(config, spec, 2048, WINDOW, share_embeddings_and_output_weights=True, **rope)
    model = Float16Module(config, model.to(DEVICE))
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def forward_step(data: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable]:
    """One micro-batch, as Megatron's schedules ask for it."""
    window = next(data)
    positions = torch.arange(WINDOW, device=DEVICE).expand(len(window), -1)
    hidden = torch.ones(1, 1, WINDOW, WINDOW, dtype=torch.bool, device=DEVICE).triu(1)  # True: not attended to
    losses = model(window[:, :-1], positions, hidden, labels=window[:, 1:])
    return losses, lambda losses: (losses.float().mean(), losses.detach().float().mean())  # to minimise, and to return


def windows() -> Iterator[Tensor]:
    """Endless micro-batches [MICRO_BATCH, WINDOW + 1] of the text; the ranks of one replica draw the same ones."""
    text = (HF_MODEL / "calibration.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(HF_MODEL)(text, verbose=False).input_ids)
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    while True:
        starts = torch.randint(len(tokens) - WINDOW, (MICRO_BATCH, 1), generator=generator)
        yield tokens[starts + torch.arange(WINDOW + 1)].to(DEVICE)


def say(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
