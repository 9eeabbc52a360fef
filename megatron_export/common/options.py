"""What an option is: a dataclass field with its help and its choices, from which flags and keywords are made."""

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from .text import near

Made = TypeVar("Made")


@dataclass(frozen=True)
class Option:
    """What a field's metadata says of it.

    help      one sentence, for --help and for the docstrings of functions that take it as a keyword
    choices   the values that it may have; () if it may have any
    flag      the command's flag, if it is not the field's name; the flag of a field that is True makes it False
    planned   whether the command `plan` has the flag: the option changes what is written, or what an export needs
    digested  whether the fingerprint of settings has it: it decides bytes, and nothing else in the fingerprint shows it
    """

    help: str
    choices: tuple = ()
    flag: str = ""
    planned: bool = True
    digested: bool = True


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that is an option; `more` are fields of `Option`."""
    return field(default=default, metadata={"option": Option(help, **more)})


def options_of(kind: type) -> dict[str, Field]:
    """The options of a dataclass by name, with those of dataclasses that are its fields."""
    found: dict[str, Field] = {}
    for one in fields(kind):
        if "option" in one.metadata:
            found[one.name] = one
        elif is_dataclass(one.default):
            found |= options_of(type(one.default))
    return found


def told_by(one: Field) -> Option:
    """What a field says of itself as an option."""
    return one.metadata["option"]


def flag_of(one: Field) -> str:
    """The command's flag of an option, as `--group-size`."""
    return "--" + (told_by(one).flag or one.name).replace("_", "-")


def made(kind: type[Made], values: dict[str, Any]) -> Made:
    """A dataclass of `kind` from values by name of option or of field; fields without a value have their defaults. A list becomes a
    tuple where the default is one.
    """
    given = {one.name: (values[one.name], one.default) for one in fields(kind) if one.name in values}
    own = {name: tuple(value) if isinstance(default, tuple) else value for name, (value, default) in given.items()}
    for one in fields(kind):
        if "option" not in one.metadata and is_dataclass(one.default) and one.name not in values:
            own[one.name] = made(type(one.default), values)
    return kind(**own)


def values_of(settings: object) -> dict[str, Any]:
    """Name of option -> the value that a dataclass has."""
    found: dict[str, Any] = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        if "option" in one.metadata:
            found[one.name] = value
        elif is_dataclass(value):
            found |= values_of(value)
    return found


def checked(kind: type, given: Iterable[str], without: Collection[str] = ()) -> None:
    """Raise `TypeError` for a name that is no option of `kind`, as Python does for an unknown keyword, or is in `without`."""
    known = [name for name in options_of(kind) if name not in without]
    for name in given:
        if name in without:
            raise TypeError(f"the keyword {name!r} has no effect here. Leave it out")
        if name not in known:
            meant = near(name, known)
            hint = f"Did you mean {meant!r}?" if meant else f"Known: {', '.join(known)}"
            raise TypeError(f"unexpected keyword {name!r}. {hint}")


def takes_options(kind: type, without: Collection[str] = ()) -> Callable[[Callable], Callable]:
    """Decorate a function with **options: its signature and docstring show the options of `kind`, but for `without`."""
    options = {name: one for name, one in options_of(kind).items() if name not in without}

    def shown(function: Callable) -> Callable:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
            for name, one in options.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        lines = [f"{name}: {told_by(one).help} (default: {one.default!r})" for name, one in options.items()]
        function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Options, as of the command:", *lines])
        return function

    return shown
