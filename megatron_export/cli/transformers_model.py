"""The transformers model of a run of the command: transformers loads it, for this process or for FSDP2 on all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

from ..checkpoint.hf_weights import SourceWeights
from ..checkpoint.original import Original
from ..checkpoint.torch_dist import MegatronCheckpoint
from ..common.errors import ExportError, report
from ..common.progress import Progress
from ..distributed import world as worlds
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..export.origins import Unbuilt, live
from ..export.prepare import Opening, open_export
from ..hf.dtensors import fully_sharded
from ..models import shape_of
from .config import ExportConfig


@contextmanager
def world(config: ExportConfig) -> Iterator[Topology]:
    """The ranks of a `torchrun`, or this process alone. Collective."""
    with worlds.started(config.device, config.tp), worlds.plain(config.request.timeout) as here:
        yield here


def check(config: ExportConfig, hf_config: dict, here: Topology) -> None:
    """`ExportError` for what transformers does not load as it is."""
    problems = []
    if config.tp not in (1, here.world):
        problems.append(
            f"--tp {config.tp} of {here.world} ranks: with --engine transformers all ranks share each tensor. Give --tp "
            f"{here.world}, or none for FSDP2"
        )
    if config.tp > 1 and not find_spec("accelerate"):
        problems.append(
            "--tp with --engine transformers needs accelerate, as transformers says. pip install accelerate"
        )
    if hf_config.get("quantization_config"):
        problems.append(
            "the weights of --hf-model are quantized, and --engine transformers reads those that are not. Leave --engine out"
        )
    if shape_of(hf_config).mtp:
        problems.append(
            "transformers leaves out layers that predict one more token. Give --mtp drop, or leave --engine out"
        )
    report(problems)


def unbuilt(config: ExportConfig) -> Unbuilt:
    """The model before it is loaded: planned as if one rank had all of it."""
    return Unbuilt(None, alone=True)


def load(
    config: ExportConfig,
    original: Original,
    checkpoint: MegatronCheckpoint | None,
    length: int | None,
    here: Topology,
    progress: Progress,
) -> tuple[nn.Module, int]:
    """The model as transformers loads it, and the bytes of weights that this rank read. Collective.

    length  of the samples that it will be run on; None: it will not be
    """
    if length and config.tp > 1:
        with together(here, "check the calibration"):
            raise ExportError(
                f"--tp {config.tp} cuts the inputs of linears, which calibration must see whole. Leave --tp out (FSDP2 cuts the "
                "model then), or give --load-calibration"
            )
    here.pulse.at("load the weights")
    if config.tp > 1:  # collective itself
        model = _loaded(config, original, tp_plan="auto")
    else:
        with together(here, "load the weights"):
            model = _loaded(config, original)
            model = model if here.world > 1 else model.to(here.device)
        nbytes = sum(tensor.nbytes for tensor in model.parameters())
        return (fully_sharded(model, here.device) if here.world > 1 else model), nbytes
    return model, sum(tensor.nbytes for tensor in model.parameters()) // here.world


def built(here: Topology, opening: Opening, model: nn.Module) -> Opening:
    """The opening of a model that was not loaded yet, now that it is. Collective."""
    return open_export(here, live(model), opening.original, opening.given, opening.statistics, None)


def _loaded(config: ExportConfig, original: Original, **how: str) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    (name,) = original.config["architectures"]
    known = getattr(transformers, name, transformers.AutoModelForCausalLM)
    code = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    given = {"dtype": torch.bfloat16, **how}
    if original.dcp is None:
        return known.from_pretrained(original.folder, **given, **code).eval()
    with SourceWeights(original.dcp, config=original.config) as weights:
        weights.check_model(original.config, original.dropped)
        kinds = dict.fromkeys(original.wide, torch.float32)
        state = {name: weights.whole(name).to(kinds.get(name, torch.bfloat16)) for name in weights.homes}
    settings = transformers.AutoConfig.from_pretrained(original.folder, **code)
    return known.from_pretrained(None, config=settings, state_dict=state, **given).eval()
