"""All that a report and a model card tell: the judgement, the manifest, the engines' verdicts."""

import re
from dataclasses import dataclass
from pathlib import Path

from ...common.file_names import MANIFEST
from ...planning.engine_check import of_plan, verdicts
from ...planning.plan import Plan
from ...writing.fingerprint import of_file
from ...writing.manifest import said_of
from ..emulation import bits_per_weight
from ..snr import Likeness
from ..thresholds import Inspection, worst_lines

_LICENSE = re.compile(r"\A---\n(?:.*\n)*?license: *([\w.-]+)\n(?:.*\n)*?---\n")
_FLAG = re.compile(r"--[\w-]+ [\w.]+")
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
        """How it came about, as the manifest says it."""
        return self.manifest.get("run", {})

    @property
    def calibration(self) -> dict:
        return {key: value for key, value in self.made.get("calibration", {}).items() if value is not None}

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
    manifest = folder / MANIFEST
    return Account(
        name=name or folder.name,
        origin=Path(origin).name if Path(origin).exists() else origin,
        plan=found.judged.plan,
        found=found,
        worst=worst_lines(found),
        manifest=said_of(folder),
        digest=of_file(manifest) if manifest.is_file() else "",
        engines={engine: verdict.text for engine, verdict in verdicts(of_plan(found.judged.plan)).items()},
        bits=bits_per_weight(folder),
        license=_license(found.judged.reference),
    )


def _license(reference: Path) -> str:
    card = reference / "README.md"
    found = _LICENSE.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return found[1] if found else ""
