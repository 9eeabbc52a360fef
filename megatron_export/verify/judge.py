"""A checkpoint judged against the model that it was made from: structure first, then every number, read once, in strips.

`weight_pairs.py` says how the smoothing of AWQ is undone, `snr.py` what counts as explained by rounding. Memory is bounded by
the strips that threads compare, and a row of numbers for each smoothing vector.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import hf_folder
from ..checkpoint.hf_weights import SourceWeights
from ..common.errors import ExportError
from ..common.file_names import MANIFEST
from ..common.folder_kinds import refuse_adapters
from ..common.progress import Progress, quiet
from ..common.safe_files import inside, shown
from ..common.threads import threads
from ..formats import VARIANTS
from ..models import head_of, is_linear_weight, mtp_prefixes, parameters_of, shape_of
from ..planning.parameter import Item
from ..planning.plan import Plan
from ..writing.crc32 import crc32_of_file, spelled
from ..writing.fingerprint import of_file
from .detect_format import Described, Variant, described
from .diagnosis import diagnosis
from .dialects import check_judged
from .folder import Finished, json_of
from .snr import Likeness, likenesses, tolerance
from .structure import bad_numbers, faults, plan_of, unequal, without_place
from .weight_pairs import Sides, threads_for

CODES, CODES_SMOOTHED = 0.002, 0.1  # share of codes that may be others than the nearest
DIAGNOSED = 20  # weights; beyond, only the numbers are told
THREADS = 4


@dataclass
class Judgement:
    """What was found.

    problems  what is wrong, a sentence each, the name of the tensor or file first
    weights   every weight that could be compared
    scalars   input_scale, k_scale and v_scale, by name
    nbytes    of the files with tensors
    """

    folder: Path
    reference: Path
    said: Described
    plan: Plan | None
    problems: list[str] = field(default_factory=list)
    weights: list[Likeness] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0


def judge(
    folder: Path,
    reference: Path,
    *,
    device: torch.device | str = "cpu",
    min_snr: float | None = None,
    listed: bool = True,
    progress: Progress = quiet,
) -> Judgement:
    """Judge the checkpoint in `folder`; `listed`: also against the sums in its manifest, if it has one.

    `ExportError` where it cannot be judged: no tensors, an unknown dialect or architecture, a reference that is not whole.
    """
    refuse_adapters(folder)
    found = Finished(folder)
    check_judged(found)
    said = described(found)
    problems = [*found.problems, *said.problems, *(_against_manifest(folder) if listed else ())]
    parameters_of(config := hf_folder.read_config(reference))  # what is wrong with the reference itself is raised
    with SourceWeights(reference, config=config) as weights:
        try:
            plan, mixed = _plan(found, said, reference, weights)
        except ExportError as error:
            return Judgement(folder, reference, said, None, [*problems, f"not compared further: {error}"])
        if weights.quantized:  # whose parts must fit together before one is read
            weights.check_model(
                plan.config, () if shape_of(plan.config).mtp else mtp_prefixes(plan.config, weights.files)
            )
        problems += [*mixed, *faults(found, said, plan), *without_place(weights, plan)]
        judged = Judgement(folder, reference, said, plan, problems, nbytes=found.nbytes())
        with threads() as each:
            names = list(found)
            for _, bad in zip(progress("numbers", names), each(partial(bad_numbers, found), names), strict=True):
                problems += bad
            problems += unequal(found, plan)
        device = torch.device(device)
        with threads(threads_for(device)) as each:
            _compare(judged, Sides(plan, found, weights, device, each), min_snr, progress)
    judged.scalars = {
        name: float(found.read(name))
        for name in found
        if name.endswith((".input_scale", ".k_scale", ".v_scale")) and torch.Size(found.shape(name)).numel() == 1
    }
    judged.problems = list(dict.fromkeys(problems))
    return judged


def _against_manifest(folder: Path) -> list[str]:
    """Files that are not what the manifest says, if there is one."""
    files = json_of(folder, MANIFEST).get("files", {})
    if not isinstance(files, dict) or not all(isinstance(said, dict) for said in files.values()):
        return [f"{MANIFEST}: {shown(files)} is no list of files"]
    paths = [inside(folder, name) for name in files]
    with ThreadPoolExecutor(THREADS) as pool:
        sums = dict(zip(files, pool.map(_sum_of, paths, files.values()), strict=True))
    return [
        f"{name} is {'missing, a file' if mine is None else 'not the file'} that {MANIFEST} lists"
        for name, mine in sums.items()
        if mine != _sum_in(files[name])
    ]


def _sum_in(said: dict) -> object:
    """What a manifest says of a file's bytes: their sha256, or else their crc32."""
    return said.get("sha256") or said.get("crc32")


def _sum_of(path: Path, said: dict) -> str | None:
    """The same of the file; None if it is not there."""
    if not path.is_file():
        return None
    return of_file(path) if said.get("sha256") else spelled(crc32_of_file(path))


def _plan(found: Finished, said: Described, reference: Path, weights: SourceWeights) -> tuple[Plan, list[str]]:
    """The plan of such a checkpoint. Where AWQ leaves a trace in norms alone (NVFP4), it is of AWQ if most of them are changed."""
    plan, mixed = plan_of(found, said, reference)
    folded = {form.algorithm: (o, form) for o, form in reversed(VARIANTS) if form.smoothing}
    plain = [one for one in said.variants if one.form.algorithm in folded]
    if any(one.form.smoothing for one in said.variants) or not plain:
        return plan, mixed
    try:
        others = [one for one in said.variants if one not in plain]
        smoothing = [Variant(*folded[one.form.algorithm], one.modules) for one in plain]
        smoothed, again = plan_of(found, replace(said, variants=(*others, *smoothing)), reference)
    except ExportError:  # an architecture that cannot be smoothed
        return plan, mixed
    sides = Sides(smoothed, found, weights, torch.device("cpu"))
    norms = [i for i in smoothed.items if i.smoothed.rows and not is_linear_weight(i.source.canonical)]
    norms = [(i, "", slice(0, i.source.shape[0])) for i in norms if "" in i.source.names() and sides.comparable(i, "")]
    other = sum(not torch.equal(sides.decoded(*norm), sides.plain(*norm)) for norm in norms)
    return (smoothed, again) if 2 * other > len(norms) else (plan, mixed)


def _compare(judged: Judgement, sides: Sides, min_snr: float | None, progress: Progress) -> None:
    diagnosed = 0
    parts = [(i, part) for i in sides.plan.items for part in i.source.names() if sides.comparable(i, part)]
    for (item, part), found in zip(progress("compare", parts), likenesses(sides, parts), strict=True):
        judged.weights.append(found)
        text = _verdict(found, tolerance(sides, item, part), min_snr)
        if found.wrong and diagnosed < DIAGNOSED and (more := diagnosis(sides, item, part, found.first[0])):
            text += f"; {more}"
        diagnosed += bool(found.wrong)
        judged.problems += [text] if text else []
        judged.problems += [] if found.wrong else _factors(sides, item, part)
    copied = [output.name for output in sides.plan.copied if output.name in sides.found]
    for name, same in zip(copied, sides.each(partial(_is_copy, sides), copied), strict=True):
        judged.problems += [] if same else [f"{name} is not the reference's, of which it should be a copy"]
    _compare_head(judged, sides)


def _is_copy(sides: Sides, name: str) -> bool:
    return torch.equal(sides.found.read(name), sides.weights.whole(name))


def _compare_head(judged: Judgement, sides: Sides) -> None:
    """A tied model may have its head once more, if it is the embedding."""
    if not shape_of(sides.plan.config).tied:
        return
    embedding = sides.items["embedding.word_embeddings.weight"].source.rule.hf
    head, found = head_of(sides.plan.config), sides.found
    if head in found and embedding in found:
        pairs = zip(found.strips(head), found.strips(embedding), strict=False)
        if found.shape(head) != found.shape(embedding) or not all(torch.equal(a, b) for a, b in pairs):
            judged.problems.append(f"{head} is not {embedding}, to which config.json ties it")
    if sides.weights.differing({head: embedding}):
        judged.problems.append(
            f"{head} of the reference is not its {embedding}, though its config.json ties the two: set tie_word_embeddings to "
            "false there, and export it again"
        )


def _verdict(found: Likeness, tolerance: float, min_snr: float | None) -> str:
    """What is wrong with one weight, in a sentence; empty for nothing."""
    name, snr = found.name, found.snr
    if found.wrong:
        row, column = found.first
        if not found.quantized:
            rows = "row" if len(found.shape) > 1 else "number"
            return f"{name}: {found.wrong:,} of {found.blocks:,} {rows}s differ from the reference, first {row} ({snr:z.1f} dB)"
        where = f"row {row}" + (f", input {column}" if column else "")
        return (
            f"{name}: {found.wrong:,} of {found.blocks:,} blocks are further from the reference than rounding explains, "
            f"first at {where} ({snr:z.1f} dB)"
        )
    share = found.codes / max(found.count, 1)
    if found.quantized and share > (CODES_SMOOTHED if found.smoothed else CODES):
        return (
            f"{name}: {share:.1%} of its codes are not the nearest to the reference: made from other weights, or by another "
            "method of rounding"
        )
    floor = found.form.least_snr if min_snr is None else min_snr
    if snr < floor and not (tolerance and not found.quantized):
        return f"{name}: {snr:z.1f} dB, below {floor:g}"
    return ""


def _factors(sides: Sides, item: Item, part: str) -> list[str]:
    """Factors that no smoothing has."""
    factors = sides.factors(item, part)
    if factors is None or item.source.canonical.endswith(".bias"):
        return []
    known = factors[~factors.isnan()]
    if known.numel() and not ((known > 9e-5) & (known < 1.1e4)).all():
        return [f"{item.source.names()[part]}: smoothed by {float(known.min()):.3g} to {float(known.max()):.3g}"]
    return []
