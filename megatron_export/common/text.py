"""Text for people: sizes, lists of names, misspelt words, and what files say, which must not steer a terminal."""

import re
from collections.abc import Iterable, Sequence

_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^/\s:'\"]+/)+")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MOST_APART = 2  # letters of a misspelt word


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


def clean(text: str, kept: str = "\n\t") -> str:
    """A text as a screen may show it: letters that steer a terminal, turn the direction of writing or cannot be seen are spelled
    as in Python, such as `\\x1b`, but for those that are `kept`.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in kept else ascii(one)[1:-1] for one in text)


def without_folders(text: str) -> str:
    """A text with the names of files and folders, and not where they lie."""
    return _FOLDERS.sub("", text)


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def near(word: str, known: Iterable[str]) -> str | None:
    """What a misspelt or shortened word was meant to be: the shortest of `known` that it is a part of, else the one that differs by
    at most two letters, capitals apart; None if all are further from it.
    """
    word, known = word[:80].lower(), list(known)
    if len(word) > MOST_APART and (longer := [one for one in known if word in one.lower()]):
        return min(longer, key=len)
    distance, meant = min((_apart(word, one.lower()), one) for one in known)
    return meant if distance <= MOST_APART and 2 * distance < len(word) else None


def _apart(one: str, other: str) -> int:
    """How many letters are to be put in, left out or replaced to make one word of the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for count, letter in enumerate(one, 1):
        above, row = row, [count]
        for n, theirs in enumerate(other):
            row.append(min(above[n] + (letter != theirs), above[n + 1] + 1, row[n] + 1))
    return row[-1]
