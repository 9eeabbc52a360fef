"""Modules that take long to import, imported when something in them is first used."""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any

_lock = RLock()


def import_later(*names: str) -> None:
    """Of packages: from here on, `import torch` takes no time, and torch is imported with the first attribute of it that is asked
    for. That is for commands that look at names and shapes: most of their modules have functions that work on tensors too, which
    are not called.

    `from torch import Tensor` asks for an attribute, and so does `import torch.distributed`: a module that such a command imports
    has the first under `if TYPE_CHECKING`, and not the second. A module that is there already stays as it is, and one that is not
    installed is missed where it is imported.
    """
    for name in names:
        spec = PathFinder.find_spec(name)
        if name in sys.modules or spec is None or spec.loader is None:
            continue
        module = module_from_spec(spec)
        vars(module).pop("__path__", None)  # who imports a part of it asks for this
        module.__class__ = _Later
        sys.modules[name] = module


def import_now(name: str) -> None:
    """Import what was to be imported later."""
    hasattr(import_module(name), "__path__")


class _Later(ModuleType):
    """A module that nobody has used. `importlib.util.LazyLoader` has one too, which the second `import` of it uses."""

    def __getattr__(self, name: str) -> Any:
        with _lock:  # other threads wait until all of it is there
            if "__path__" not in vars(self):
                spec = self.__spec__
                self.__path__ = spec.submodule_search_locations
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    del sys.modules[spec.name]
                    raise
                self.__class__ = ModuleType
        return ModuleType.__getattribute__(self, name)
