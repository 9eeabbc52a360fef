"""How each engine decides from a config's list of names whether a module is left out of quantization: it compares the names of its
joined modules or of their members, by parts of names, globs or ancestors.
"""

from fnmatch import fnmatch, fnmatchcase
from functools import cached_property

GATE_UP = ("gate_proj", "up_proj")
JOINED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    GATE_UP: "gate_up_proj",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
}


IN_FILES = (
    ("qkv_proj",),
    ("gate_up_proj",),
)  # of Phi 3; of in_proj_qkvz of Qwen3-Next no engine tells its config any members
_MEMBERS = {name: parts for parts, name in JOINED.items() if (name,) in IN_FILES}


class Partly(Exception):
    """Only some members of a joined module are listed."""


class Names:
    """The names that a config lists, sorted by how they can match, so that large lists stay cheap."""

    def __init__(self, listed: tuple[str, ...]) -> None:
        self.listed = listed
        self.plain = frozenset(listed)
        self.globs = tuple(name for name in listed if any(letter in name for letter in "*?["))
        self.of_experts = tuple(name for name in listed if "experts" in name)

    @cached_property
    def expanded(self) -> "Names":
        """As vLLM reads them: a star right after a word stands for that module, and for all that is in it."""
        found: list[str] = []
        for name in self.listed:
            whole = name.endswith("*") and len(name) > 1 and name[-2] != "."
            found += [name[:-1], f"{name[:-1]}.*"] if whole else [name]
        return Names(tuple(found))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The names between points."""
        return tuple(f".{name.rstrip('.')}." for name in self.listed)

    @cached_property
    def tails(self) -> frozenset[str]:
        """The last words of the names."""
        return frozenset(name.rpartition(".")[2] for name in self.listed)


def full(parent: str, last: str) -> str:
    """The name of the module `last` in `parent`; either may be ''."""
    return f"{parent}.{last}".strip(".")


def _all_or_none(found: list[bool]) -> bool:
    if any(found) and not all(found):
        raise Partly
    return all(found)


def vllm_exactly(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """vLLM's exact comparison: every member of a joined module; for experts, whether a listed name contains theirs."""
    prefix = full(parent, joined)
    if len(parts) > 1:
        return prefix in names.plain or _all_or_none([f"{parent}.{part}" in names.plain for part in parts])
    if "experts" in prefix:
        return any(prefix in name for name in names.of_experts)
    return prefix in names.plain


def vllm_modelopt(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """vLLM in ModelOpt's dialect: as `vllm_exactly`, or a listed name is a part of the module's, or a glob that matches it."""
    names, prefix = names.expanded, full(parent, joined)
    if vllm_exactly(names, parent, parts, joined):
        return True
    inside = any(name in prefix for name in names.listed if name != prefix)
    return inside or any(fnmatch(prefix, glob) for glob in names.globs)


def _within(names: Names, module: str) -> bool:
    """Whether a listed name is the module, an ancestor, or whole words in the middle of its name."""
    inside = f".{module}."
    return any(words in inside for words in names.words)


def sglang_skipped(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """SGLang's comparison by whole words; every member of a joined module, of both projections to latents if `joined` is named."""
    prefix = full(parent, joined)
    if len(parts) == 1 and joined in _MEMBERS:  # one tensor in the file too
        parts = _MEMBERS[joined]
    if parts in JOINED or (joined and len(parts) > 1):
        return _all_or_none([_within(names, f"{parent}.{part}") for part in parts])
    experts = names.of_experts if "experts" in prefix else ()
    return _within(names, prefix) or any(prefix in name for name in experts)


def sglang_excluded(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """SGLang's globs, which match the whole name of its own module or one word of it."""
    prefix = full(parent, joined)
    prefixes = {prefix, prefix.removeprefix("language_model.")}
    candidates = prefixes | {word for one in prefixes for word in one.split(".")}
    if not names.plain.isdisjoint(candidates):
        return True
    if any(fnmatchcase(one, glob) for glob in names.globs for one in candidates):
        return True
    latent = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"} & names.tails
    return any(tail in prefix.rpartition(".")[2] for tail in latent)


def tensorrt_llm(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """TensorRT-LLM's globs, which match the module or an ancestor; one member leaves out the joined module."""
    for module in [full(parent, part) for part in parts] or [parent]:
        words = module.split(".")
        ancestors = {".".join(words[:count]) for count in range(1, len(words) + 1)}
        if not names.plain.isdisjoint(ancestors):
            return True
        if any(_glob(glob, ancestor) for glob in names.globs for ancestor in ancestors):
            return True
    return False


def _glob(glob: str, name: str) -> bool:
    return fnmatchcase(name, glob) or (glob.endswith(".*") and fnmatchcase(name, glob[:-2]))
