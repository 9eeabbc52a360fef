"""The settings of one export. The command's flags are derived from the fields, their help from the text under each."""

import ast
import inspect
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ExportConfig:
    """Everything `launch/export.py` can be told."""

    output: Path | None = None
    """folder to write, which must not exist or be empty; needed unless --dry-run"""
    tp: int = 1
    """tensor-parallel size"""
    pp: int = 1
    """pipeline-parallel size; the world size must be tp * pp * dp, data-parallel ranks share the calibration data"""
    vpp: int = 1
    """virtual pipeline stages of each pipeline rank"""
    pp_layout: str | None = None
    """what each stage holds, as Megatron writes it, such as 'Ettt|tttt|tttL' (default: as even as the layers allow)"""
    ep: int = 1
    """expert-parallel size: each of these ranks holds a part of the experts"""
    etp: int | None = None
    """tensor-parallel size of the experts; ep * etp * pp must divide the world size (default: that of --tp)"""
    hf_model: str | None = None
    """HF model folder or hub id: weights, config, tokenizer (default: the example model in this repository)"""
    megatron_checkpoint: Path | None = None
    """checkpoint of Megatron-LM or Megatron-Bridge (torch_dist) to take the weights from, of any parallelism; --hf-model gives
    config and tokenizer"""
    iteration: int | None = None
    """iteration of the Megatron checkpoint (default: its latest)"""
    merge_lora: bool = False
    """merge LoRA adapters that the Megatron checkpoint has into the weights"""
    lora_checkpoint: Path | None = None
    """checkpoint with LoRA adapters alone, as Megatron-Bridge saves them, to merge into the weights of --megatron-checkpoint: the
    latest iteration, or the iter_* folder that is given"""
    format: Literal["bf16", "fp8", "fp8_pb", "nvfp4", "nvfp4_awq", "int4_awq", "w4a8_awq"] | None = None
    """format of the linears' weights and activations (default: that of ModelOpt's quantizers in a Megatron checkpoint, else fp8)"""
    kv_cache: Literal["none", "fp8", "nvfp4"] | None = None
    """format of the KV cache (default: that of ModelOpt's quantizers in a Megatron checkpoint, else none)"""
    group_size: Literal[128, 64] = 128
    """inputs that share a scale, for int4_awq and w4a8_awq"""
    fp8_pb_spelling: Literal["native", "modelopt"] = "native"
    """native: weight_scale_inv, which vLLM, SGLang and TensorRT-LLM read; modelopt: FP8_PB_WO, which SGLang refuses"""
    awq_output: Literal["folded", "modelopt"] = "folded"
    """of nvfp4_awq. folded: plain NVFP4, for every engine; modelopt: o_proj keeps pre_quant_scale, for TensorRT-LLM"""
    awq_clip: bool = False
    """AWQ formats: also search by how much to clip the weights"""
    calib_data: Path | None = None
    """.txt, .jsonl or .parquet with a column `text`, or .safetensors with `input_ids` [samples, tokens], used as they
    are (default: text in this repository)"""
    calib_samples: int = 128
    """calibration samples"""
    calib_seq_len: int = 512
    """tokens of a sample"""
    calib_batch_size: int = 4
    """samples of a micro-batch"""
    calib_all_experts: bool = False
    """measure every expert on all tokens, not on those routed to it"""
    save_calibration: Path | None = None
    """write the statistics to this .safetensors file"""
    load_calibration: Path | None = None
    """read the statistics from this file instead of running calibration data"""
    overwrite: bool = False
    """replace a folder that is not empty, in the moment the new one is complete"""
    writers: Literal["rank0", "node", "all"] = "rank0"
    """which ranks write files: rank 0, the first of every node, or all; the bytes are the same"""
    no_fsync: bool = False
    """publish before everything is on the disk: faster, and lost if the machine fails within a minute"""
    resume: bool = False
    """go on with an interrupted export into the same folder; if there is none, start"""
    timeout: float = 600
    """seconds after which a rank that is not heard of counts as gone"""
    max_shard_size: str = "5GB"
    """largest safetensors file"""
    exclude: tuple[str, ...] = ()
    """globs over HF module names to leave in bfloat16"""
    mtp: Literal["keep", "drop"] = "keep"
    """layers that predict one more token (DeepSeek): export them like the others, or leave them out"""
    quantize_mla: bool = False
    """quantize latent attention (DeepSeek) too, in formats that not every engine loads it in"""
    target: str = ""
    """engines that must load the result, such as vllm,sglang,tensorrt_llm, or vllm:8 for eight GPUs that share each layer: if one
    would refuse it, nothing is written"""
    trust_remote_code: bool = False
    """run Python code that the model's folder has for its tokenizer; it can do whatever you can"""
    verify: bool = False
    """judge the checkpoint against --hf-model before it is published; what is not good enough is not published"""
    min_snr: float | None = None
    """with --verify: least signal-to-noise of a weight in dB (default: what its format gives at worst)"""
    max_ppl_ratio: float | None = None
    """with --verify: largest perplexity over the original's, measured on --verify-text"""
    verify_text: Path | None = None
    """with --verify: also measure perplexity and KL on this text, in emulated arithmetic, if both models fit on rank 0"""
    report: bool = False
    """--verify, and write report.html and a model card, README.md, into the checkpoint"""
    push_to_hub: str | None = None
    """upload the published checkpoint to this repository of the hub, which is made, private, if there is none"""
    dry_run: bool = False
    """print what would be written, read no weights, write nothing"""
    device: Literal["cuda", "cpu"] | None = None
    """cuda (NCCL) or cpu (gloo) (default: cuda where there is one)"""

    def __post_init__(self) -> None:
        sizes = ("tp", "pp", "vpp", "ep", "etp", "calib_samples", "calib_seq_len", "calib_batch_size")
        for name in sizes:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.timeout < 1:
            raise ValueError(f"--timeout must be at least 1 second, not {self.timeout:g}")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"--vpp {self.vpp} needs --pp of at least 2")
        if self.output is None and not self.dry_run:
            raise ValueError("--output DIR is needed (or --dry-run)")
        self._check_source()
        if self.load_calibration and (self.save_calibration or self.calib_data):
            raise ValueError(
                "--load-calibration replaces calibration: --save-calibration and --calib-data have no effect"
            )
        self._check_judging()
        needs_none = self.format == "bf16" or (self.format == "fp8_pb" and self.kv_cache in ("none", None))
        if needs_none and (self.load_calibration or (self.calib_data and not self.save_calibration)):
            raise ValueError(
                f"--format {self.format} needs no calibration: --calib-data and --load-calibration have no effect"
            )
        if self.format == "bf16" and self.save_calibration:
            raise ValueError("--format bf16 needs no calibration: --save-calibration has no effect")

    def _check_source(self) -> None:
        if self.megatron_checkpoint and self.hf_model is None:
            raise ValueError("--megatron-checkpoint needs --hf-model PATH_OR_ID for config and tokenizer")
        if self.iteration is not None and (self.megatron_checkpoint is None or self.iteration < 0):
            raise ValueError(f"--iteration {self.iteration}: give the number of one in --megatron-checkpoint DIR")
        for flag, given in (("--merge-lora", self.merge_lora), ("--lora-checkpoint", self.lora_checkpoint)):
            if given and self.megatron_checkpoint is None:
                raise ValueError(
                    f"{flag} has no effect without --megatron-checkpoint, which has the weights to merge with"
                )

    def _check_judging(self) -> None:
        judged = self.verify or self.report
        for name in ("min_snr", "max_ppl_ratio", "verify_text"):
            if getattr(self, name) is not None and not judged:
                raise ValueError(f"--{name.replace('_', '-')} has no effect without --verify or --report")
        if self.max_ppl_ratio is not None and self.verify_text is None:
            raise ValueError("--max-ppl-ratio needs --verify-text FILE")


def helps() -> dict[str, str]:
    """Field name -> the text under the field."""
    body = ast.parse(inspect.getsource(ExportConfig)).body[0].body
    texts = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[field.target.id] = " ".join(text.value.value.split())
    return texts
