"""Reference of the Python API, read from signatures and docstrings."""

from __future__ import annotations

import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import proper
from docs_reference.markdown import NOTE, code, docstring

INTRODUCTION = """\
`proper.run` and `proper.load` are the stable entry points. The other names are what these two return, and the parts of
the package that a program may want to use by themselves. The
[architecture page](../architecture.md#all-modules) lists everything else.
"""

PUBLIC = {
    "Entry points": ["proper.run", "proper.load"],
    "A trained run": ["Model", "Users", "PersonalizedModel", "Answer"],
    "Data and config": ["Config", "load_config", "make_config"],
    "Adapter store": ["AdapterStore", "UserRecord", "Head", "Version"],
    "Layers": [
        "AdaptedLinear",
        "AdapterBank",
        "Experts",
        "UserAwareRouter",
        "LoraAwareRouter",
        "BatchContext",
        "RowContext",
    ],
    "Training and enrolment": ["MultiUserTrainer", "Fitter", "FitWorker", "fit_embedding"],
    "Inference": ["Engine", "EngineThread", "Request"],
    "Export": ["export_user", "import_user", "export_backbone"],
    "Errors": [],
}


def page() -> str:
    """Return the page: one section per group of names."""
    parts = [NOTE, "# Python API\n", INTRODUCTION]
    for title, names in PUBLIC.items():
        parts.append(f"## {title}\n")
        parts += [_section(name, find(name)) for name in names]
        if title == "Errors":
            parts += [_section(name, value) for name, value in _errors()]
    return "\n".join(parts)


def find(name: str) -> Any:
    """Return a public object by `proper.NAME`, or by its bare name, which occurs once in the package.

    Raises:
        LookupError: no module defines the name, or several do.
    """
    if name.startswith("proper."):
        return getattr(proper, name.removeprefix("proper."))
    found = [vars(module)[name] for module in _modules() if _defines(module, name)]
    if len(found) != 1:
        raise LookupError(f"{name}: defined {len(found)} times; docs_reference/api.py lists it")
    return found[0]


@cache
def _modules() -> tuple[ModuleType, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [one.name for one in pkgutil.walk_packages(proper.__path__, "proper.")]
        return tuple(import_module(name) for name in names if not name.endswith("__main__"))


def _defines(module: ModuleType, name: str) -> bool:
    value = vars(module).get(name)
    return value is not None and getattr(value, "__module__", None) == module.__name__


def _errors() -> Iterator[tuple[str, Any]]:
    for name, value in vars(import_module("proper.errors")).items():
        if inspect.isclass(value) and issubclass(value, Exception):
            yield name, value


def _section(name: str, value: Any) -> str:
    kind = "class" if inspect.isclass(value) else "function"
    shown = name.rpartition(".")[2]
    parts = [f"### {shown}\n", f"{kind} of {code(value.__module__)}\n"]
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        parts.append(_signature(shown, value))
    parts.append(docstring(inspect.getdoc(value) or ""))
    if inspect.isclass(value):
        parts += list(_members(value))
    return "\n".join(parts)


def _members(value: type) -> Iterator[str]:
    for name, member in vars(value).items():
        function = inspect.unwrap(getattr(member, "__func__", member))
        if isinstance(member, property):
            text = inspect.getdoc(member.fget) or ""
            if not name.startswith("_") and text:
                yield f"#### {value.__name__}.{name} (property)\n\n{docstring(text)}"
        elif inspect.isfunction(function) and not name.startswith("_") and function.__doc__:
            signature = _signature(f"{value.__name__}.{name}", function, bound=not isinstance(member, staticmethod))
            yield f"#### {value.__name__}.{name}\n\n{signature}\n{docstring(inspect.getdoc(function) or '')}"


def _signature(name: str, value: Any, bound: bool = False) -> str:
    try:
        signature = inspect.signature(value)
    except ValueError:
        return ""
    parameters = [*signature.parameters.values()][bound:]
    if inspect.isclass(value) and any(one.name in ("args", "kwargs", "data") for one in parameters):
        return ""
    shown = [_parameter(one) for one in _with_marks(parameters)]
    result = "" if inspect.isclass(value) else _annotation(signature.return_annotation, " -> ")
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {one},\n" for one in shown) + f"){result}"
    return f"```python\n{line}\n```\n"


def _with_marks(parameters: list[inspect.Parameter]) -> Iterator[inspect.Parameter | str]:
    """Yield parameters with the star before the first that can be given by name only."""
    marked = False
    for one in parameters:
        if one.kind is inspect.Parameter.VAR_POSITIONAL:
            marked = True
        if one.kind is inspect.Parameter.KEYWORD_ONLY and not marked:
            marked = True
            yield "*"
        yield one


def _parameter(one: inspect.Parameter | str) -> str:
    if isinstance(one, str):
        return one
    stars = "*" if one.kind is one.VAR_POSITIONAL else "**" if one.kind is one.VAR_KEYWORD else ""
    text = f"{stars}{one.name}{_annotation(one.annotation, ': ')}"
    if one.default is inspect.Parameter.empty:
        return text
    default = repr(one.default)
    # The address of an object, and the values of a dataclass, say nothing here.
    return f"{text} = ..." if re.search(r" at 0x|^<|\w\(", default) else f"{text} = {default}"


def _annotation(value: Any, lead: str) -> str:
    if value is inspect.Parameter.empty or value is inspect.Signature.empty:
        return ""
    return lead + (value if isinstance(value, str) else inspect.formatannotation(value))
