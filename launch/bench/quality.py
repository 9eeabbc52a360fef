"""`quality`: what quantization costs: scores of exported checkpoints, with the quantized arithmetic emulated, on GPU or CPU.

    python launch/benchmark.py quality [--hf-model DIR] [--formats FORMAT ...] [--output DIR] [CHECKPOINT ...]

Without a CHECKPOINT the model is calibrated once and exported in every format; more rows show what options are worth. With
CHECKPOINTs, from whatever tool, those are scored. The others are compared with the first row, whose tokenizer serves for all.
verify/emulation.py says what is computed and how near it is to engines.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_export.cli.export_command import EXAMPLE_MODEL, bar
from megatron_export.common.cpu_products import fast_products
from megatron_export.common.errors import ExportError
from megatron_export.common.optional import part
from megatron_export.formats import FORMATS, KV_FORMATS
from megatron_export.planning import recipe
from megatron_export.verify.emulation import bits_per_weight, load
from megatron_export.verify.perplexity import WINDOW, letters_of, of_window, windows_of

from .drawing import frontier
from .measuring import add_device, alone, compared, markdown

BATCH, MICRO_BATCH = 8, 4
LAYER_WINDOWS = 16  # that the layers are compared on, one by one
PAGE = Path(__file__).resolve().parents[2] / "docs" / "quality.md"
RECIPES = [name for name in recipe.names() if "experts" not in name]  # the example model has none
MARKS = "<!-- quality -->", "<!-- /quality -->"
COLUMNS = ("format", "bits per weight", "bytes", "perplexity", "ratio", "change, nats per token")
COLUMNS += ("mean KL", "worst KL", "worst layer")


class Row(NamedTuple):
    """One checkpoint to make: its label in the table, its format (None: of a recipe), and how it differs from the defaults."""

    label: str
    format: str | None
    options: dict[str, str] = {}
    searched: bool = True


class Call(NamedTuple):
    """How the reference called one of its decoder layers, and what came out."""

    args: tuple
    kwargs: dict
    output: Tensor


@dataclass
class Score:
    """What has been measured of one checkpoint so far.

    losses         mean negative log-likelihood of each window's tokens after its first, nats, float64
    divergences    KL of the next token's distribution from the reference's, nats, by token
    signal, noise  by decoder layer: squares of what the reference's layer adds to its input, and of the difference
    """

    label: str
    folder: Path
    losses: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)
    signal: Tensor | float = 0.0
    noise: Tensor | float = 0.0


def add_quality(parser: argparse.ArgumentParser) -> None:
    """The flags of `quality`."""
    parser.set_defaults(run=quality)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", type=Path, nargs="*", help="score these; export nothing")
    parser.add_argument("--hf-model", default=str(EXAMPLE_MODEL), help="model to export; default: the example model")
    parser.add_argument("--calib-data", type=Path, help="default: the example model's calibration text")
    parser.add_argument("--calib-samples", type=int, default=128, help="default: 128")
    parser.add_argument("--calib-seq-len", type=int, default=512, help="default: 512")
    parser.add_argument("--text", type=Path, default=EXAMPLE_MODEL / "heldout.txt", help="default: the example's")
    parser.add_argument("--windows", type=int, help=f"how many windows of {WINDOW} tokens; default: all there are")
    parser.add_argument("--output", type=Path, help="where to keep the exports; default: a folder that is deleted")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    parser.add_argument("--kv-cache", choices=KV_FORMATS, default="none", help="of all but bf16; default: none")
    parser.add_argument(
        "--recipes", nargs="*", default=RECIPES, help="default: all that quantize a model without experts"
    )
    add_device(parser)
    readme = f"write the table into docs/{PAGE.name}, and its plot beside it"
    parser.add_argument("--write-readme", action="store_true", help=readme)


def quality(flags: argparse.Namespace) -> None:
    """Export unless told what to score; score; print the table."""
    if flags.write_readme:
        parts_of_page()
    letters_of(flags.text)
    with TemporaryDirectory() as temporary:
        folders = {str(path): path for path in flags.checkpoints}
        folders = folders or exported(flags, flags.output or Path(temporary))
        windows = windows_of(flags.text, next(iter(folders.values())))[: flags.windows]
        if len(windows) < 2:
            raise ExportError(f"{flags.text}: {len(windows)} windows of {WINDOW} tokens; a standard error needs two")
        scores = [Score(label, folder) for label, folder in folders.items()]
        measure(scores, windows, torch.device(flags.device))
        lines, plot = table(scores), frontier(points_of(scores))
    print(f"{len(windows)} windows of {WINDOW} tokens\n\n" + "\n".join(lines), flush=True)
    if flags.write_readme:
        before, after = parts_of_page()
        PAGE.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + after]))
        PAGE.with_suffix(".svg").write_text(plot)


def parts_of_page() -> tuple[str, str]:
    """The page's text before and after the marks."""
    before, first, rest = PAGE.read_text().partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not (first and last):
        raise ExportError(f"{PAGE}: no text between {' and '.join(MARKS)}. Put the marks where the table is to be")
    return before, after


def rows_of(formats: list[str], recipes: list[str] = []) -> list[Row]:  # noqa: B006 - not changed
    """One row for each format and recipe, and beside some of them rows that show the worth of an option or of a search."""
    beside = {
        "nvfp4": [Row(f"nvfp4, {scales}", "nvfp4", {"nvfp4_scales": scales}) for scales in ("mse", "four_over_six")],
        "nvfp4_awq": [
            Row("nvfp4_awq, four_over_six", "nvfp4_awq", {"nvfp4_scales": "four_over_six"}),
            Row("nvfp4_awq, modelopt", "nvfp4_awq", {"awq_output": "modelopt"}),
        ],
        "w4a16_nvfp4": [
            Row(f"w4a16_nvfp4, {scales}", "w4a16_nvfp4", {"nvfp4_scales": scales})
            for scales in ("mse", "four_over_six")
        ],
        "int4_awq": [Row("int4 without search", "int4_awq", searched=False)],
    }
    rows = [row for name in dict.fromkeys(formats) for row in (Row(name, name), *beside.get(name, ()))]
    return rows + [Row(Path(name).stem, None, {"recipe": name}) for name in recipes]


def exported(flags: argparse.Namespace, output: Path) -> dict[str, Path]:
    """Calibrate the model once and export every row from it: label -> folder."""
    from megatron_export import calibrate, export_hf_checkpoint
    from megatron_export.calibration import data
    from megatron_export.checkpoint import hf_folder

    build, load_hf, parallel_state = (part(f"mcore.{name}") for name in ("build", "load_hf", "parallel_state"))

    rows = rows_of(flags.formats, flags.recipes)
    folders = {row.label: output / row.label.replace(",", "").replace(" ", "_") for row in rows}
    if taken := [str(folder) for folder in folders.values() if folder.exists()]:
        raise ExportError(f"{', '.join(taken)} exists already. Give another --output, or delete it")
    source = hf_folder.find_model(flags.hf_model, weights=True)
    text = flags.calib_data or EXAMPLE_MODEL / "calibration.txt"
    samples = data.read_samples(text, source, samples=flags.calib_samples, length=flags.calib_seq_len)
    alone()
    with parallel_state.started(1, 1, flags.device):
        with parallel_state.current() as here:
            config = hf_folder.read_config(source)
            model = build.build_model(config, here, max_sequence_length=samples.shape[1])
            load_hf.load_hf_weights(model, source, config, here)
        found = calibrate(model, samples.split(MICRO_BATCH), format=flags.formats, progress=bar)
        for row in bar("export", rows):
            export_hf_checkpoint(
                model,
                folders[row.label],
                hf_model=source,
                **({"format": row.format} if row.format else {}),
                calibration=found if row.searched else without_search(found),
                kv_cache="none" if row.format == "bf16" else flags.kv_cache,
                **row.options,
            )
    return folders


def without_search(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same statistics with smoothing vectors of ones."""
    return statistics | {n: torch.ones_like(t) for n, t in statistics.items() if ".pre_quant_scale." in n}


@torch.no_grad()
def measure(scores: list[Score], windows: Tensor, device: torch.device) -> None:
    """Run all models over one batch after the other, and keep numbers alone. The first model is the reference."""
    models = [load(score.folder, device) for score in scores]
    for number, batch in enumerate(bar("score", windows.to(device).split(BATCH))):
        reference, calls = watched(models[0], batch)
        for score, model in zip(scores, models, strict=True):
            logits = reference if model is models[0] else model(batch, use_cache=False).logits
            compare_tokens(score, logits, reference, batch)
            if number * BATCH < LAYER_WINDOWS:
                compare_layers(score, model, calls)


def watched(model: nn.Module, batch: Tensor) -> tuple[Tensor, list[Call]]:
    """A model's logits, and how its decoder layers were called on the way."""
    calls: list[Call] = []

    def keep(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        calls.append(Call(args, kwargs, output))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in model.base_model.layers]
    logits = model(batch, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, calls


def compare_tokens(score: Score, logits: Tensor, reference: Tensor, batch: Tensor) -> None:
    """Add the loss of every window of a batch and the divergence of all its predictions; one window at a time."""
    for mine, theirs, ids in zip(logits, reference, batch, strict=True):
        loss, divergence = of_window(mine, theirs, ids)
        score.losses.append(loss)
        score.divergences.append(divergence)


def compare_layers(score: Score, model: nn.Module, calls: list[Call]) -> None:
    """Add the signal and the noise of every layer, given what the reference's layer was given."""
    pairs = zip(model.base_model.layers, calls, strict=True)
    with fast_products(calls[0].output.device):  # as the models multiply, of which these layers are called alone
        wrong = [square(layer(*call.args, **call.kwargs), call.output) for layer, call in pairs]
    score.signal = score.signal + torch.stack([square(call.output, call.args[0]) for call in calls])
    score.noise = score.noise + torch.stack(wrong)


def square(left: Tensor, right: Tensor) -> Tensor:
    """Sum of squares of the difference, float64 [] on the CPU."""
    return (left.float() - right.float()).square().sum(dtype=torch.float64).cpu()


def table(scores: list[Score]) -> list[str]:
    """The lines of a markdown table."""
    first = torch.stack(scores[0].losses)
    rows = []
    for score in scores:
        losses, divergence = torch.stack(score.losses), torch.cat(score.divergences)
        ratio, change = compared(losses - first)
        size = sum(path.stat().st_size for path in score.folder.glob("*.safetensors"))
        bits = bits_per_weight(score.folder, every=True)
        cells = [score.label, f"{bits:.3f}", f"{size:,}", f"{losses.mean().exp():.4f}"]
        cells += [ratio, change if score is not scores[0] else ""]
        cells += [f"{divergence.mean():.5f}", f"{divergence.max():.2f}", worst_layer(score)]
        rows.append(cells)
    return markdown(COLUMNS, rows)


def points_of(scores: list[Score]) -> dict[str, tuple[float, float]]:
    """Label -> bits per weight of all linears, and mean KL, of all but the reference."""
    means = {score.label: float(torch.cat(score.divergences).mean()) for score in scores[1:]}
    return {score.label: (bits_per_weight(score.folder, every=True), means[score.label]) for score in scores[1:]}


def worst_layer(score: Score) -> str:
    """The lowest signal-to-noise ratio of a decoder layer, and which it is, counted from 0."""
    decibels = 10 * torch.log10(score.signal / score.noise)
    lowest = int(decibels.argmin())
    return f"{decibels[lowest]:.1f} dB in {lowest}" if decibels[lowest].isfinite() else ""
