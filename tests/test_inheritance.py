"""No class of the package overrides a method of a concrete class of the package: abstract or final, nothing between."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator
from functools import cached_property

from pydantic import BaseModel
from torch import nn

import proper

METHODS = (property, classmethod, staticmethod, cached_property)


def classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(proper.__path__, "proper."):
        if not module.name.endswith("__main__"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = vars(importlib.import_module(module.name))
            yield from (each for each in found.values() if inspect.isclass(each) and each.__module__ == module.name)


def methods(cls: type) -> set[str]:
    """The concrete methods and properties that a class itself defines, special ones but `__call__` left out."""
    return {
        name
        for name, value in vars(cls).items()
        if (inspect.isfunction(value) or isinstance(value, METHODS))
        and not getattr(value, "__isabstractmethod__", False)
        and (name == "__call__" or not name.startswith("__"))
    }


def is_concrete(base: type) -> bool:
    """Whether a base is a class of the package with behaviour of its own; errors and data models may be refined."""
    refined = issubclass(base, Exception | BaseModel) or getattr(base, "_is_protocol", False)
    return base.__module__.partition(".")[0] in ("proper", __name__.partition(".")[0]) and not refined


def overridden(cls: type) -> set[str]:
    """The methods of concrete bases that a class replaces; `forward` of a torch module is meant to be."""
    own = methods(cls) - ({"forward"} if issubclass(cls, nn.Module) else set())
    return {f"{base.__name__}.{name}" for base in cls.__mro__[1:] if is_concrete(base) for name in own & methods(base)}


def test_no_class_overrides_a_concrete_class() -> None:
    found = {f"{cls.__module__}.{cls.__name__}": names for cls in classes() if (names := overridden(cls))}
    assert not found, "take a protocol or a callback argument instead"


class _Concrete:
    def score(self) -> int:
        return 1

    @property
    def tier(self) -> str:
        return "base"


class _Extends(_Concrete):
    def respond(self) -> int:
        return self.score()


class _Overrides(_Concrete):
    def score(self) -> int:
        return 2

    @property
    def tier(self) -> str:
        return "users"


def test_an_override_is_found() -> None:
    assert overridden(_Overrides) == {"_Concrete.score", "_Concrete.tier"} and not overridden(_Extends)
