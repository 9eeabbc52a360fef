"""The settings of the command: those of a `Request`, and those of the model that it builds, of calibration and of judging."""

from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

from ..common.errors import ExportError
from ..common.options import made, option
from ..common.safe_files import parsed
from ..common.text import parse_size
from ..engines import targets_in
from ..models.hf_config import text_of
from ..planning.request import Request
from . import hub

LENGTH = 512  # tokens of a sample, without --calib-seq-len
MEGATRON, TRANSFORMERS = "megatron", "transformers"
LEAST_SHARD = 1000  # bytes: who writes a smaller number forgot its unit
beside = partial(option, planned=False)  # of the command alone: `plan` has no use for it


@dataclass(frozen=True)
class ExportConfig:
    """Everything that the command can be told. `ValueError` for settings that contradict each other or have no effect."""

    output: Path | None = option(None, "folder to write, which must not exist or be empty; needed unless --dry-run")
    tp: int = option(1, "tensor-parallel size")
    pp: int = option(
        1, "pipeline-parallel size; the world size must be tp * pp * dp, data-parallel ranks share the calibration data"
    )
    vpp: int = option(1, "virtual pipeline stages of each pipeline rank")
    pp_layout: str | None = option(
        None,
        "what each stage holds, as Megatron writes it, such as 'Ettt|tttt|tttL' (default: as even as the layers allow)",
    )
    ep: int = option(1, "expert-parallel size: each of these ranks holds a part of the experts")
    etp: int | None = option(
        None, "tensor-parallel size of the experts; ep * etp * pp must divide the world size (default: that of --tp)"
    )
    hf_model: str | None = option(
        None, "HF model folder or hub id: weights, config, tokenizer (default: the example model in this repository)"
    )
    megatron_checkpoint: Path | None = option(
        None,
        "checkpoint of Megatron-LM or Megatron-Bridge (torch_dist, or fsdp_dtensor of Megatron-FSDP) to take the weights from, of "
        "any parallelism; --hf-model gives config and tokenizer. Without it, config.json is made of the checkpoint's own settings",
    )
    tokenizer: str | None = option(
        None, "folder or hub id of the tokenizer, for a --megatron-checkpoint without --hf-model"
    )
    architecture: str | None = option(
        None,
        "what config.json calls the model, for a --megatron-checkpoint without --hf-model whose settings fit several",
    )
    config_value: tuple[str, ...] = option(
        (),
        "keys of config.json that the settings of a --megatron-checkpoint without --hf-model cannot say, as KEY=VALUE in JSON",
    )
    iteration: int | None = option(None, "iteration of the Megatron checkpoint (default: its latest)")
    dcp_checkpoint: Path | None = beside(
        None,
        "folder that torch.distributed.checkpoint wrote, with the names of HF (FSDP2, accelerate), to take the weights "
        "from; --hf-model gives config and tokenizer",
    )
    lora_checkpoint: Path | None = beside(
        None,
        "checkpoint with LoRA adapters alone, as Megatron-Bridge saves them, to merge into the weights of --megatron-checkpoint: "
        "the latest iteration, or the iter_* folder that is given",
    )
    engine: str = beside(
        MEGATRON,
        "what loads and runs the model: megatron, which needs megatron-core, or transformers, in one process, or on the ranks of a "
        "torchrun, over which FSDP2 cuts the model, or --tp N as its own plan says",
        choices=(MEGATRON, TRANSFORMERS),
    )
    request: Request = Request()  # noqa: RUF009 - frozen
    calib_data: Path | None = beside(
        None,
        ".txt, .jsonl or .parquet with a column `text`, or .safetensors with `input_ids` [samples, tokens], used as they are "
        "(default: text in this repository)",
    )
    calib_samples: int | None = beside(
        None, "calibration samples (default: 128, or what the data has if that is fewer)"
    )
    calib_seq_len: int | None = option(
        None, "tokens of a sample (default: 512, or max_position_embeddings of config.json if that is fewer)"
    )
    calib_batch_size: int = option(4, "samples of a micro-batch")
    calib_all_experts: bool = beside(False, "measure every expert on all tokens, not on those routed to it")
    save_calibration: Path | None = beside(None, "write the statistics to this .safetensors file")
    load_calibration: Path | None = beside(
        None, "read the statistics from this file instead of running calibration data"
    )
    trust_remote_code: bool = beside(
        False,
        "run Python code that the model's folder has for its tokenizer, and with --engine transformers for itself; it can do "
        "whatever you can",
    )
    verify: bool = beside(
        False,
        "judge the checkpoint against --hf-model before it is published; what is not good enough is not published",
    )
    min_snr: float | None = beside(
        None,
        "with --verify: least signal-to-noise of a weight in dB (default: what its format gives at worst)",
    )
    max_ppl_ratio: float | None = beside(
        None, "with --verify: largest perplexity over the original's, measured on --verify-text"
    )
    verify_text: Path | None = beside(
        None,
        "with --verify: also measure perplexity and KL on this text, in emulated arithmetic, if both models fit on rank 0",
    )
    report: bool = beside(False, "--verify, and write report.html and a model card, README.md, into the checkpoint")
    push_to_hub: str | None = beside(
        None,
        "upload the published checkpoint to this repository of the hub, which is made, private, if there is none",
    )
    dry_run: bool = beside(False, "print what would be written, read no weights, write nothing")
    device: str | None = option(
        None, "cuda (NCCL) or cpu (gloo) (default: cuda where there is one)", choices=("cuda", "cpu")
    )

    def __post_init__(self) -> None:
        if parse_size(self.request.max_shard_size) < LEAST_SHARD:
            said = self.request.max_shard_size
            raise ValueError(f"--max-shard-size {said} is less than a kilobyte. Write it with a unit, like 5GB")
        targets_in(self.request.target)
        if self.request.effective_bits is not None and self.dry_run and not self.load_calibration:
            raise ValueError(
                "--effective-bits chooses formats by what calibration measures, so no plan can know them before: export, or plan "
                "the recipe.yaml of an export with --recipe"
            )
        sizes = ("tp", "pp", "vpp", "ep", "etp", "calib_samples", "calib_seq_len", "calib_batch_size")
        for name in sizes:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 1 <= self.request.timeout < inf:  # NaN is neither
            raise ValueError(f"--timeout must be at least 1 second, and finite, not {self.request.timeout:g}")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"--vpp {self.vpp} needs --pp of at least 2")
        if self.output is None and not self.dry_run:
            raise ValueError("--output DIR is needed (or --dry-run)")
        self._check_source()
        self._check_alone()
        self._check_calibration()
        self._check_judging()

    def _check_source(self) -> None:
        if self.engine == TRANSFORMERS:
            sizes = {name: getattr(self, name) for name in ("pp", "vpp", "ep", "etp", "pp_layout")}
            given = [name for name, value in sizes.items() if value not in (1, None)]
            given += ["megatron_checkpoint"] if self.megatron_checkpoint else []
            if given:
                raise ValueError(
                    f"--{given[0].replace('_', '-')} has no effect with --engine transformers. Leave one out"
                )
        if self.dcp_checkpoint and self.megatron_checkpoint:
            raise ValueError("--dcp-checkpoint and --megatron-checkpoint both give the weights. Leave one out")
        if self.dcp_checkpoint and self.hf_model is None:
            raise ValueError("--dcp-checkpoint needs --hf-model PATH_OR_ID for config and tokenizer")
        if self.iteration is not None and (self.megatron_checkpoint is None or self.iteration < 0):
            raise ValueError(f"--iteration {self.iteration}: give the number of one in --megatron-checkpoint DIR")
        for flag, given in (("--merge-lora", self.request.merge_lora), ("--lora-checkpoint", self.lora_checkpoint)):
            if given and self.megatron_checkpoint is None:
                raise ValueError(
                    f"{flag} has no effect without --megatron-checkpoint, which has the weights to merge with"
                )

    def _check_alone(self) -> None:
        """What belongs to a Megatron checkpoint without an HF model."""
        alone = self.megatron_checkpoint is not None and self.hf_model is None
        for name in ("tokenizer", "architecture", "config_value"):
            if getattr(self, name) and not alone:
                other = "with --hf-model, whose config and tokenizer are taken"
                other = other if self.hf_model else "without --megatron-checkpoint"
                raise ValueError(f"--{name.replace('_', '-')} has no effect {other}. Leave it out")
        if alone and (self.verify or self.report):
            raise ValueError("--verify and --report compare with --hf-model. Give it")
        self.keys()

    def keys(self) -> dict[str, Any]:
        """Key of config.json -> value, of --config-value; a value that is no JSON is a text."""
        found: dict[str, Any] = {}
        for pair in self.config_value:
            key, equals, text = pair.partition("=")
            if not equals or not key.isidentifier() or key in found:
                raise ValueError(f"--config-value {pair}: give KEY=VALUE, such as rope_theta=1000000, each key once")
            try:
                found[key] = parsed(text.encode())
            except ValueError:
                found[key] = text
        return found

    def _check_calibration(self) -> None:
        if self.load_calibration and (self.save_calibration or self.calib_data):
            raise ValueError(
                "--load-calibration replaces calibration: --save-calibration and --calib-data have no effect"
            )
        if self.request.format is None and self.request.recipe is None:
            return
        try:
            settled = self.request.plain()
            forms = settled.forms().values()
        except ExportError:  # which the plan raises again
            return
        quantizes, given = any(form.quantization for form in forms), settled.input_scale is not None
        cache = settled.kv_cache != "none" and settled.kv_scale is None
        measured = any(form.calibrated for form in forms)
        name = f"--recipe {self.request.recipe}" if self.request.recipe else f"--format {self.request.format}"
        name += " with --input-scale" if given else ""
        needs_none = not measured and not (quantizes and cache)
        if needs_none and (self.load_calibration or (self.calib_data and not self.save_calibration)):
            raise ValueError(f"{name} needs no calibration: --calib-data and --load-calibration have no effect")
        if not quantizes and self.save_calibration:
            raise ValueError(f"{name} needs no calibration: --save-calibration has no effect")

    def _check_judging(self) -> None:
        judged = self.verify or self.report
        for name in ("min_snr", "max_ppl_ratio", "verify_text"):
            if getattr(self, name) is not None and not judged:
                raise ValueError(f"--{name.replace('_', '-')} has no effect without --verify or --report")
        if self.max_ppl_ratio is not None and self.verify_text is None:
            raise ValueError("--max-ppl-ratio needs --verify-text FILE")
        check_thresholds(self.min_snr, self.max_ppl_ratio)
        if self.push_to_hub is not None:
            hub.check_name(self.push_to_hub)


def check_thresholds(min_snr: float | None, max_ppl_ratio: float | None) -> None:
    """`ValueError` for thresholds that every checkpoint would pass, or none."""
    if min_snr is not None and not isfinite(min_snr):
        raise ValueError(f"--min-snr must be a number, not {min_snr:g}")
    if max_ppl_ratio is not None and not 0 < max_ppl_ratio < inf:
        raise ValueError(f"--max-ppl-ratio must be above 0, and finite, not {max_ppl_ratio:g}")


def sample_length(config: ExportConfig, hf_config: dict) -> int:
    """Tokens of a sample of calibration text; `ExportError` if more are asked for than the model was made for."""
    most, asked = text_of(hf_config).get("max_position_embeddings"), config.calib_seq_len
    if most and asked and asked > most:
        raise ExportError(f"--calib-seq-len {asked} is {beyond(most)}. Give {most} or less")
    return asked or min(LENGTH, most or LENGTH)


def beyond(most: int) -> str:
    """What a sample of more tokens is."""
    return f"more than max_position_embeddings {most} in config.json, for which the model was made"


def configured(**values: Any) -> ExportConfig:
    """The settings with these values, by name of option."""
    return made(ExportConfig, values)
