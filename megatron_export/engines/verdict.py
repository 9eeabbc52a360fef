"""What an engine makes of a checkpoint: a verdict, the findings that it rests on, and the rules that found them."""

from dataclasses import dataclass
from enum import Enum


class Effect(Enum):
    """What happens to a checkpoint that does not meet a rule; the worst first."""

    REFUSES = "refused"  # does not load, or loads and computes nonsense
    UNKNOWN = "not known"
    LOSES = "loads but"  # something of it has no effect, or is computed wrongly
    MINDS = "loads"  # on some machines, or with a flag


@dataclass(frozen=True)
class Rule:
    """One demand of an engine, and the effect on a checkpoint that does not meet it.

    `source` is project, version and file; `seen`: a run of the engine has shown it, not only its code.
    """

    effect: Effect
    says: str
    source: str
    seen: bool = False


def table(project: str, files: dict[str, str], rows: dict[str, tuple[Effect, str, str, bool]]) -> dict[str, Rule]:
    """Rules from rows: effect, what is demanded, the key of the source in `files`, whether it was seen."""
    return {
        name: Rule(effect, says, f"{project} {files[file]}", seen) for name, (effect, says, file, seen) in rows.items()
    }


@dataclass(frozen=True)
class Finding:
    """Where a checkpoint does not meet a rule: why, of which tensors or modules, and what would change it."""

    rule: str
    effect: Effect
    why: str
    way: str
    names: tuple[str, ...]

    @property
    def text(self) -> str:
        """Names, reason and way out in one line."""
        more = f" and {len(self.names) - 1:,} more" if len(self.names) > 1 else ""
        of = f"{self.names[0]}{more}: " if self.names else ""
        return f"{of}{self.why}{f' ({self.way})' if self.way else ''}"


@dataclass(frozen=True)
class Verdict:
    """What one engine makes of a checkpoint."""

    engine: str
    version: str
    findings: tuple[Finding, ...]

    @property
    def effect(self) -> Effect:
        """The worst effect among the findings."""
        found = {finding.effect for finding in self.findings}
        return next((effect for effect in Effect if effect in found), Effect.MINDS)

    @property
    def loads(self) -> bool | None:
        """Whether it loads; None if that is not known."""
        return {Effect.REFUSES: False, Effect.UNKNOWN: None}.get(self.effect, True)

    @property
    def why(self) -> str:
        """The findings that decide; if it loads, all findings."""
        decisive = [finding for finding in self.findings if self.loads or finding.effect is self.effect]
        return "; ".join(finding.text for finding in decisive)

    @property
    def text(self) -> str:
        """Effect and reasons in one line."""
        return f"{self.effect.value}: {self.why}" if self.why else self.effect.value


class Findings:
    """What was found so far by an engine's rules; the same finding of many modules is kept once, with all their names."""

    def __init__(self, rules: dict[str, Rule]) -> None:
        self.rules = rules
        self.found: dict[tuple[str, str, str], list[str]] = {}

    def add(self, rule: str, why: str, *names: str, way: str = "") -> None:
        """Note that a rule is not met: why, by which tensors or modules, and the way out."""
        assert rule in self.rules, f"{rule!r} is no rule of this engine"
        self.found.setdefault((rule, why, way), []).extend(names)

    def all(self) -> tuple[Finding, ...]:
        """The findings, the worst first, then in the order of the rules."""
        effects, rules = list(Effect), list(self.rules)
        made = [
            Finding(rule, self.rules[rule].effect, why, way, tuple(sorted(set(names), key=_in_order)))
            for (rule, why, way), names in self.found.items()
        ]
        return tuple(sorted(made, key=lambda one: (effects.index(one.effect), rules.index(one.rule), one.why)))


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]
