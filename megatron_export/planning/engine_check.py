"""Which engines load a checkpoint, before one is started: of a folder, whoever wrote it, or of a plan that is yet to be written."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..common.dtypes import SPELLED
from ..common.errors import ExportError
from ..common.file_names import CONFIG, INDEX, QUANT_CONFIG
from ..common.safe_files import headers, inside, read_index, read_table
from ..engines import ENGINES, CheckpointView, Header, Verdict, targets_in, verdict_of
from ..models import copied_prefixes, parameters_of
from ..models.sources import expected_shapes
from .plan import Plan
from .quant_config import config_json, hf_quant_config


def of_plan(plan: Plan) -> CheckpointView:
    """The checkpoint that a plan will write."""
    files = {
        file: {output.name: Header(SPELLED[output.dtype], output.shape) for output in outputs}
        for file, outputs in plan.files.items()
    }
    return CheckpointView(
        config=config_json(plan),
        quant=hf_quant_config(plan),
        files=files,
        expected=expected_shapes(item.source for item in plan.items),
        copied=copied_prefixes(plan.config),
    )


def of_folder(folder: Path) -> CheckpointView:
    """The checkpoint in a folder, of which headers and configs are read and no weights."""
    if not folder.is_dir():
        raise ExportError(
            f"{folder} is not a folder. Give the folder of a checkpoint: config.json and .safetensors files"
        )
    config = _json(folder, CONFIG)
    if config is None:
        raise ExportError(f"{folder} has no config.json. Give the folder of a checkpoint")
    names = sorted(path.name for path in folder.iterdir())
    files = [name for name in names if name.endswith(".safetensors")]
    index = {name: path.name for name, path in read_index(folder).items()} if INDEX in names else None
    read = {file: {name: Header(*said) for name, said in headers(inside(folder, file)).items()} for file in files}
    expected, copied = expected_of(config)
    return CheckpointView(
        config=config,
        quant=_json(folder, QUANT_CONFIG),
        files=read,
        index=index,
        expected=expected,
        copied=copied,
    )


def _json(folder: Path, name: str) -> dict | None:
    path = inside(folder, name)
    if not path.exists():
        return None
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: not readable ({error}). Fetch it again") from error


def expected_of(config: dict) -> tuple[dict[str, tuple[int, ...]] | None, tuple[str, ...]]:
    """The tensors of the model that config.json means, and the prefixes of those that are copied; None where it has a part
    that the tables do not know.
    """
    try:
        return expected_shapes(parameters_of(config).values()), copied_prefixes(config)
    except ExportError:
        return None, ()


def verdicts(
    checkpoint: CheckpointView,
    engines: Iterable[str] = (),
    version: str | None = None,
    gpu: str | None = None,
    tp: int = 1,
) -> dict[str, Verdict]:
    """Name of the engine -> its verdict, on `tp` GPUs that share each layer; without `engines`, of all of them."""
    found = (verdict_of(checkpoint, engine, version, gpu, tp) for engine in engines or ENGINES)
    return {verdict.engine: verdict for verdict in found}


def refusals(plan: Plan, target: str) -> list[str]:
    """Why engines that a user exports for would not load the result, one by one."""
    try:
        sizes = targets_in(target)
    except ValueError as error:
        raise ExportError(f"--target: {error}") from error
    checkpoint = of_plan(plan) if sizes else None
    found = [verdict_of(checkpoint, engine, tp=size) for engine, size in sizes.items()]
    return [f"--target: {one.engine} will not load this: {one.why}" for one in found if one.loads is False]


def as_json(found: dict[str, Verdict]) -> dict:
    """Verdicts for machines."""
    return {
        name: {
            "version": verdict.version,
            "loads": verdict.loads,
            "verdict": verdict.effect.value,
            "findings": [asdict(finding) | {"effect": finding.effect.value} for finding in verdict.findings],
        }
        for name, verdict in found.items()
    }


def lines(found: dict[str, Verdict]) -> list[str]:
    """Verdicts for people: a line for each engine, and one for each thing that was found."""
    shown = []
    for name, verdict in found.items():
        shown.append(f"{name} {verdict.version}: {verdict.effect.value}{':' if verdict.findings else ''}")
        shown += [f"    {finding.text}" for finding in verdict.findings]
    return shown


def rules() -> list[str]:
    """Every rule of every engine: what happens where it is not met, whether a run was seen to do so, and where it was read."""
    rows = []
    for module in ENGINES.values():
        rows.append(f"{module.NAME} {module.VERSION}")
        rows += [
            f"  {name:<14} {rule.effect.value:<9}  {'seen' if rule.seen else 'read'}  {rule.says} [{rule.source}]"
            for name, rule in module.RULES.items()
        ]
    return rows
