"""In a process of its own: exports folders with the command, as a Megatron user has it, from a source folder that nobody installed.

python -m export_folders NAME=SOURCE ... -- FLAGS; each goes to a folder NAME here. Prints, as JSON, where the package lies, which
norm Megatron would choose, and status and words of each export.
"""

import importlib.metadata
import json
import sys

real = importlib.metadata.Distribution.from_name


def from_name(name: str) -> importlib.metadata.Distribution:
    """What is installed of a name; of the package itself nothing, though it may be."""
    if name.replace("-", "_") == "megatron_export":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)


def main() -> None:
    importlib.metadata.Distribution.from_name = from_name
    from megatron.core.models import backends

    chosen = f"{backends.LNImpl.__module__}.{backends.LNImpl.__name__}"
    import megatron_export
    from megatron_export.cli import export_command

    found, end = {}, sys.argv.index("--")
    for name, source in (pair.split("=", 1) for pair in sys.argv[1:end]):
        said: list[str] = []
        flags = ["--hf-model", source, "--output", name, *sys.argv[end + 1 :]]
        found[name] = (
            export_command.main(lambda *words, said=said, **_: said.append(" ".join(map(str, words))), flags),
            said,
        )
    print(json.dumps({"package": megatron_export.__file__, "norm": chosen, "exports": found}))


if __name__ == "__main__":
    main()
