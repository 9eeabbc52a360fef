"""The end of an export on rank 0: the files around the weights, the judgement of all that was read back, the manifest, the name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.hf_folder import check_unchanged, files_to_copy
from ..checkpoint.original import Original
from ..common.file_names import MANIFEST, RECIPE
from ..distributed.signals import heed
from ..models import architecture_of
from ..planning.contents import Contents
from .fingerprint import of_settings, sha256_of
from .journal import naming
from .manifest import manifest, names_in
from .read_back import Verified, check_read_back
from .staging import Claim, Staging
from .target import check_empty
from .writer import complete, write_json


@dataclass(frozen=True)
class Destination:
    """Where an export goes: the target, the original model whose other files are copied, and what the manifest says.

    sha256  whether the manifest lists that of every file
    recipe  text of a recipe file that is written too; "" for none
    """

    folder: Path
    overwrite: bool
    resume: bool
    sync: bool
    sha256: bool
    original: Original
    identity: dict[str, str]
    provenance: dict
    notes: dict = field(default_factory=dict)
    recipe: str = ""


def open_staging(place: Destination, claim: Claim | None = None) -> Staging:
    """The staging folder of a target that nobody has taken, or that is claimed already."""
    check_empty(place.folder, overwrite=place.overwrite)
    which = place.identity | {"source of model or calibration data": of_settings(place.provenance)}
    return Staging(place.folder, which, overwrite=place.overwrite, resume=place.resume, sync=place.sync, claim=claim)


def publish(
    contents: Contents,
    staging: Staging,
    place: Destination,
    sizes: dict[str, int],
    read: list[dict[str, Verified]],
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Add the other files, judge what all writers read back, and give the folder its name; `finish` is called with it before."""
    check_unchanged(place.original.folder, place.original.files)
    alone = architecture_of(place.original.config).draft  # its base has the tokenizer
    complete(contents, staging, [] if alone else files_to_copy(place.original.folder))
    if place.recipe:
        with naming(place.folder):
            (staging.folder / RECIPE).write_text(place.recipe, encoding="utf-8")
    found = check_read_back(staging, contents, {file: verified for files in read for file, verified in files.items()})
    heed()
    sums = sha256_of([staging.folder / name for name in found]) if place.sha256 else {}
    run = {"topology": sizes, **names_in(place.provenance), **place.notes}
    with naming(place.folder):
        write_json(staging.folder / MANIFEST, manifest(contents, found, sums, place.identity, run))
    finish(staging.folder)
    heed()
    staging.publish()
