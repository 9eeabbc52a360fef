"""Flags from options, and the parser that speaks on rank 0 alone."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import Field
from difflib import get_close_matches
from types import NoneType
from typing import IO, Any, NoReturn, get_args, get_origin

from ..common.options import Option, flag_of, options_of, told_by
from ..common.text import clean
from ..distributed import last_words
from . import terminal
from .config import ExportConfig, configured

Say = Callable[..., None]


class Parser(argparse.ArgumentParser):
    """Of several ranks the first says what is wrong; the others leave later, so that it is heard before torchrun ends it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"allow_abbrev": False})

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but that it tolerates no unknown flag, and says which one was meant."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = (word.partition("=")[0].replace("_", "-") for word in unknown if word.startswith("--"))
            near = [meant for flag in flags for meant in get_close_matches(flag, self._option_string_actions, 1, 0.8)]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f'. Did you mean {near[0]}?' if near else ''}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        last_words.leave(f"error: {message}")
        if not first():
            let_rank_0_speak()
            self.exit(2)
        super().error(message)

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        file = file or sys.stderr
        with terminal.heard():  # argparse's own passes over a closed pipe
            file.write(clean(message or ""))
            file.flush()


def first() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def let_rank_0_speak() -> None:
    time.sleep(2)


def add_options(parser: argparse.ArgumentParser, wanted: Callable[[Option], bool] = lambda option: True) -> None:
    """A flag for every wanted option of `ExportConfig`."""
    for one in options_of(ExportConfig).values():
        if wanted(told_by(one)):
            default = f"{one.default:g}" if isinstance(one.default, float) else one.default
            shown = f" (default: {default})" if default not in (None, (), "") and one.type is not bool else ""
            parser.add_argument(flag_of(one), dest=one.name, help=told_by(one).help + shown, **_argument(one))


def config_of(parser: argparse.ArgumentParser, values: dict[str, Any]) -> ExportConfig:
    """The settings that flags say. Contradictions end in bad usage."""
    try:
        return configured(**values)
    except ValueError as error:
        parser.error(str(error))


def _argument(one: Field) -> dict[str, Any]:
    if one.type is bool:
        return {"action": "store_false" if one.default else "store_true"}
    kinds = [kind for kind in get_args(one.type) or (one.type,) if kind is not NoneType]
    if get_origin(one.type) is tuple:
        return {
            "nargs": "+",
            "action": "extend",
            "default": [*one.default],
            "metavar": {"set": "GLOB=FORMAT", "config_value": "KEY=VALUE"}.get(one.name, "GLOB"),
        }
    if choices := told_by(one).choices:
        return {"choices": choices, "default": one.default, "type": type(choices[0])}
    return {"type": kinds[0], "default": one.default}
