"""Sizes and lists of names as people write them."""

import re
from collections.abc import Sequence

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: str | int) -> int:
    """Bytes from an int or a string such as "5GB" (10^9) or "5GiB" (2^30). `ValueError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    if found is None or found[2].upper() not in _UNITS or float(found[1]) == 0:
        raise ValueError(f"{size!r} is not a size. Write it like 5GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def readable(nbytes: float) -> str:
    """Bytes as a short text: 1.5 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
