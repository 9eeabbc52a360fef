"""How each engine decides whether a module of its own is left out of quantization, from the names that a config lists.

Every engine compares other names in another way: with the names of its joined modules, or of their members; by parts of
names, globs or ancestors. A `Part` error is what an engine raises where only some members of a joined module are listed.
"""

from fnmatch import fnmatch, fnmatchcase
from functools import cached_property

JOINED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


class Partly(Exception):
    """Some members of a joined module are listed and others are not."""


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
    def tails(self) -> frozenset[str]:
        """The last words of the names."""
        return frozenset(name.rpartition(".")[2] for name in self.listed)


def full(parent: str, last: str) -> str:
    """The name of a module in another; of one without a name, or of the other itself where `last` is ''."""
    return f"{parent}.{last}".strip(".")


def _all_or_none(found: list[bool]) -> bool:
    if any(found) and not all(found):
        raise Partly
    return all(found)


def vllm_exactly(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """vLLM's exact comparison: of a joined module every member, of experts a part of a name that has 'experts' in it."""
    prefix = full(parent, joined)
    if len(parts) > 1:
        return prefix in names.plain or _all_or_none([f"{parent}.{part}" in names.plain for part in parts])
    if "experts" in prefix:
        return any(prefix in name for name in names.of_experts)
    return prefix in names.plain


def vllm_modelopt(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """vLLM of ModelOpt's dialect: exactly; or a listed name is a part of the module's; or it is a glob of the whole."""
    names, prefix = names.expanded, full(parent, joined)
    if vllm_exactly(names, parent, parts, joined):
        return True
    return any(name in prefix for name in names.listed if name != prefix) or any(
        fnmatch(prefix, glob) for glob in names.globs
    )


def _within(name: str, prefix: str) -> bool:
    """Whether a listed name is the module, an ancestor, or whole words in the middle of its name."""
    return f".{name.rstrip('.')}." in f".{prefix}."


def sglang_skipped(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """SGLang's comparison by whole words, of a joined module for every member."""
    prefix = full(parent, joined)
    if len(parts) > 1 and parts in JOINED:
        return _all_or_none([any(_within(name, f"{parent}.{part}") for name in names.listed) for part in parts])
    if any(_within(name, prefix) for name in names.listed):
        return True
    return "experts" in prefix and any(prefix in name for name in names.of_experts)


def sglang_excluded(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """SGLang's globs: of the whole name of its own module, or of any one word of it."""
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
    """TensorRT-LLM: a glob of the module or of an ancestor; a joined module is left out with any of its members."""
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
