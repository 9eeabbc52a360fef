"""All that a report and a model card tell: the judgement, the manifest, the engines' verdicts."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ...common.file_names import MANIFEST
from ...common.text import without_folders
from ...planning.engine_check import of_plan, verdicts
from ...planning.plan import Plan
from ...writing.fingerprint import of_file
from ...writing.manifest import names_in, said_of
from ..emulation import bits_per_weight
from ..snr import Likeness
from ..thresholds import Inspection, worst_lines

_CARD_BYTES = 4096  # of the original's card that are read
_LICENSE = re.compile(r"^license: *([\w.-]+)$", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])--[\w-]+ [\w.]+")
# What is shown of a manifest's `run`.
_TABLES = ("topology", "calibration", "versions", "seconds", "alphas", "tokens", "sensitivities")
_SERVERS = {
    "vLLM": "vllm serve {name}",
    "SGLang": "python -m sglang.launch_server --model-path {name}",
    "TensorRT-LLM": "trtllm-serve {name}",
}


@dataclass(frozen=True)
class Account:
    """What there is to tell of a checkpoint.

    name, origin  what it is called, and the hub id, or the name of the folder, that it was made from
    worst         cells of the worst weights, under thresholds.HEADS
    digest        sha256 of its manifest, "" if it has none
    engines       engine -> its verdict in words
    license       as the original's own card says it, "" if it does not
    """

    name: str
    origin: str
    plan: Plan
    found: Inspection
    worst: list[list[str]]
    manifest: dict
    digest: str
    engines: dict[str, str]
    bits: float
    license: str

    @property
    def quantized(self) -> list[Likeness]:
        return [one for one in self.found.judged.weights if one.quantized]

    @property
    def made(self) -> dict:
        """How it came about, as the manifest says it, but for what no manifest says so."""
        run = self.manifest.get("run")
        run = run if isinstance(run, dict) else {}
        return {name: said for name, said in run.items() if name in _TABLES and _is_table(name, said)}

    @property
    def calibration(self) -> dict:
        taken = {"calib_samples": self.made["samples"]} if "samples" in self.made else {}
        said = self.made.get("calibration", {}) | taken
        return {key: names_in(value) for key, value in said.items() if value is not None}

    @property
    def commands(self) -> list[str]:
        """How the engines that load it are started with this checkpoint."""
        return [
            " ".join([_SERVERS[engine].format(name=self.name), *_FLAG.findall(said)])
            for engine, said in self.engines.items()
            if said.startswith("loads") and engine in _SERVERS
        ]


def account_of(found: Inspection, origin: str, name: str | None = None) -> Account:
    """Collect it."""
    folder = found.judged.folder
    manifest, said = folder / MANIFEST, said_of(folder)
    return Account(
        name=name or folder.name,
        origin=names_in(origin),
        plan=found.judged.plan,
        found=replace(
            found,
            problems=[_with_names(found, problem) for problem in found.problems],
            unscored=_with_names(found, found.unscored),
        ),
        worst=worst_lines(found),
        manifest=said if isinstance(said.get("files"), dict) else {},
        digest=of_file(manifest) if manifest.is_file() else "",
        engines={engine: verdict.text for engine, verdict in verdicts(of_plan(found.judged.plan)).items()},
        bits=bits_per_weight(folder),
        license=_license(found.judged.reference),
    )


def _is_table(name: str, said: object) -> bool:
    """Whether a manifest can say that under this name."""
    if not isinstance(said, dict):
        return False
    if name in ("seconds", "alphas", "sensitivities"):
        return all(type(value) in (int, float) for value in said.values())
    counts = said.values() if name == "tokens" else ()
    return all(isinstance(each, list) and each and all(type(n) is int and n >= 0 for n in each) for each in counts)


def _with_names(found: Inspection, text: str) -> str:
    """A text that others will read, with the names of folders and not where they lie."""
    for folder in (found.judged.folder, found.judged.reference):
        text = text.replace(f"{folder.parent}/", "")
    return without_folders(text)


def _license(reference: Path) -> str:
    try:
        with (reference / "README.md").open("rb") as card:
            front = card.read(_CARD_BYTES).decode(errors="replace")
    except OSError:  # there is none, or it is not readable
        return ""
    first, _, rest = front.partition("---\n")
    found = None if first else _LICENSE.search(rest.partition("\n---\n")[0])
    return found[1] if found else ""
