"""Which engines load a checkpoint, told before one is started: of any folder, or of a plan that is not written yet."""

from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from ..common.errors import ExportError
from ..common.file_names import CONFIG, INDEX, QUANT_CONFIG
from ..common.folder_kinds import refuse_adapters
from ..common.safe_files import exists, headers, inside, not_read, read_index, read_table
from ..engines import DRAFTS, ENGINES, CheckpointView, Header, Rule, Verdict, runs, targets_in, verdict_of
from ..engines.drafts import COMBINED, kind_of
from ..models import copied_prefixes, parameters_of
from ..models.sources import expected_shapes
from .plan import Plan
from .quant_config import config_json, hf_quant_config


def of_plan(plan: Plan) -> CheckpointView:
    """The checkpoint that a plan will write."""
    files = {
        file: {output.name: _header(output.dtype, output.shape) for output in outputs}
        for file, outputs in plan.files.items()
    }
    expected = expected_shapes(item.source for item in plan.items)
    return CheckpointView(config_json(plan), hf_quant_config(plan), files, None, expected, copied_prefixes(plan.config))


@cache  # alike tensors share one
def _header(dtype: str, shape: tuple[int, ...]) -> Header:
    return Header(dtype, shape)


def of_folder(folder: Path) -> CheckpointView:
    """The checkpoint in a folder, from its configs and headers; `ExportError` if one of them cannot be read."""
    if not exists(folder) or not folder.is_dir():
        raise ExportError(f"{folder} is not a folder. Give that of a checkpoint: config.json and .safetensors files")
    refuse_adapters(folder)
    config = _json(folder, CONFIG)
    if config is None:
        raise ExportError(f"{folder} has no config.json. Give the folder of a checkpoint")
    names = sorted(path.name for path in folder.iterdir())
    files = [name for name in names if name.endswith(".safetensors")]
    index = {name: path.name for name, path in read_index(folder).items()} if INDEX in names else None
    if not files:
        raise ExportError(f"{folder}: no .safetensors file. Give the folder that has the weights")
    read = {file: {name: Header(*said) for name, said in headers(inside(folder, file)).items()} for file in files}
    return CheckpointView(config, _json(folder, QUANT_CONFIG), read, index, *expected_of(config))


def base_of(draft: CheckpointView, folder: Path) -> CheckpointView:
    """The base beside which a draft is to be judged; `ExportError` if there is nothing to judge with it."""
    kind = kind_of(draft)
    if not kind:
        raise ExportError("--with: this is no draft of EAGLE-3 or Medusa. Give a base with a draft alone")
    if kind == COMBINED:
        raise ExportError("--with: Medusa's heads have their base in one folder with them. Leave out --with")
    base = of_folder(folder)
    if kind_of(base):
        raise ExportError(f"--with: {folder} is a draft too. Give the folder of the model that it drafts for")
    return base


def _json(folder: Path, name: str) -> dict | None:
    path = inside(folder, name)
    if not path.exists():
        return None
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise not_read(path, "not readable", error, "Fetch it again") from error


def expected_of(config: dict) -> tuple[dict[str, tuple[int, ...]] | None, tuple[str, ...]]:
    """The tensors of the model that config.json means, None if the tables do not know it; prefixes of those that are copied.

    Of Medusa's heads beside their base these are the base's, whose class is named with Medusa before it.
    """
    names = config.get("architectures")
    if isinstance(names, list) and names and str(names[0]).startswith("Medusa"):
        config = config | {"architectures": [names[0].removeprefix("Medusa")]}
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
    base: CheckpointView | None = None,
) -> dict[str, Verdict]:
    """Name of the engine -> its verdict on `tp` GPUs that share each layer, of a draft beside its `base`; of all engines if
    `engines` is empty.
    """
    found = (verdict_of(checkpoint, engine, version, gpu, tp, base) for engine in engines or ENGINES)
    return {verdict.engine: verdict for verdict in found}


def refusals(plan: Plan, target: str, base: Plan | None = None) -> list[str]:
    """Why the engines of `--target` would not load the result, a sentence each; `ExportError` for an unknown engine. `base` is the
    plan of what a draft is for.
    """
    try:
        sizes = targets_in(target)
    except ValueError as error:
        raise ExportError(f"--target: {error}") from error
    if not sizes:
        return []
    checkpoint, beside = of_plan(plan), of_plan(base) if base else None
    found = [verdict_of(checkpoint, engine, tp=size, base=beside) for engine, size in sizes.items()]
    what = "the draft" if base else "this"
    return [f"--target: {one.engine} will not load {what}: {one.why}" for one in found if one.loads is False]


def as_json(found: dict[str, Verdict]) -> dict:
    """Verdicts as a JSON object: name of the engine -> version, loads, verdict, findings."""
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
    """Verdicts as text: a line for each engine, and one for each finding."""
    shown = []
    for name, verdict in found.items():
        shown.append(f"{name} {verdict.version}: {verdict.effect.value}{':' if verdict.findings else ''}")
        shown += [f"    {finding.text}" for finding in verdict.findings]
    return shown


def rules() -> list[str]:
    """Every rule of every engine as text: effect, where a run has shown it, demand, source; then where a run has shown which
    architecture in which formats.
    """
    rows = []
    for engine, module in ENGINES.items():
        for of, tables in (("", module), (", drafts", DRAFTS[engine])):
            seen = f"{runs.PARTS.get(engine, '')}seen in {tables.SEEN_IN}" if tables.SEEN_IN else "not run"
            rows.append(f"{module.SOURCES}{of}, {seen}")
            rows += [
                f"  {name:<14} {rule.effect.value:<9}  {_seen(engine, of, name, rule)}  {rule.says} [{rule.source}]"
                for name, rule in tables.RULES.items()
            ]
        on = f", on a GPU: {runs.ON_GPU[engine]}" if engine in runs.ON_GPU else ""
        rows += [f"{module.NAME}, architectures{on}", *(f"  {line}" for line in runs.coverage(engine))]
    return rows


def _seen(engine: str, of: str, name: str, rule: Rule) -> str:
    where = runs.seen_of(engine, f"{name}{of}", rule.seen)
    return "read         " if where == runs.READ else f"seen on a {where}"
