"""Exports of small models in all formats, and what a real engine makes of them in a process of its own."""

import json
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from megatron_export.engines import CheckpointView, Verdict, verdict_of

from ..support.ranks import Ranks
from . import product

ROOT = Path(__file__).parents[2]
EVERY = {
    name: [*product.FORMATS, *(product.WITH_MLA if name in product.LATENT else ())]
    for name in (*product.MODELS, "deepseek_v32-mtp", "deepseek_v3-mtp", "glm4_moe-mtp", "qwen3_moe-sparse")
}


def tried(loading: str, *folders: Path, flags: tuple[str, ...] = ()) -> dict[Path, dict]:
    """What became of each folder, one after the other, in the module of that name beside this one."""
    command = [sys.executable, "-m", f"tests.engines.{loading}", *flags, *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    assert len(said) == len(folders), done.stderr[-3000:]
    return {Path(one["folder"]): one for one in said}


@cache
def release(package: str) -> str:
    """Which release of an engine is installed, as it says itself; it is not imported."""
    found = find_spec(package)
    assert found is not None and found.origin is not None
    said = re.search(r"version = '([\d.]+)", (Path(found.origin).parent / "_version.py").read_text())
    assert said is not None
    return said[1]


def judged(checkpoint: CheckpointView, engine: str, tp: int = 1, base: CheckpointView | None = None) -> Verdict:
    """What the rules say of the release that is installed."""
    return verdict_of(checkpoint, engine, release(engine), tp=tp, base=base)


def told_otherwise(folder: Path) -> None:
    """A model in one format says what is left out in config.json alone, under the other file's key; a mix says nothing there."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    section = config.pop("quantization_config")
    if section["quant_algo"] != "MIXED_PRECISION":
        section["exclude_modules"] = section.pop("ignore")
        config["quantization_config"] = section
        (folder / "hf_quant_config.json").unlink()
    file.write_text(json.dumps(config))


def exported(ranks: Ranks, names: dict[str, list[str]], out: Path) -> list[Path]:
    """Folders of those models in those formats, but for what the exporter refuses."""
    folders = []
    for name, forms in names.items():
        (out / name).mkdir()
        (out / f"{name}-source").mkdir()
        model = product.source(out / f"{name}-source", name)
        if name.partition("-")[0] in product.BY_TABLE:
            refused = product.export_by_table(model, out / name, forms)
        else:
            [refused] = ranks.call(1, product.export, model, out / name, forms, seconds=300)
        folders += [out / name / form for form in forms if form not in refused]
    return folders
