"""Reference of the config, read from the pydantic models."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs_reference.markdown import NOTE, attributes, code, docstring, escape, table
from proper.config import PRESETS, Config
from proper.simulation.schema import SimulationConfig

INTRODUCTION = """\
A config is a YAML file. Every key but `data.path` has a default. `--set section.key=value` overrides a key on the
command line. An unknown key, a wrong type or an impossible value is an error that names the key; for an unknown key,
it suggests the nearest one.
"""


def page() -> str:
    """Return the page: one table per section of the config, then the presets."""
    return "\n".join([NOTE, "# Config\n", INTRODUCTION, *_sections("", Config), _presets(), *_simulation()])


def _simulation() -> Iterator[str]:
    """Yield the tables of `proper simulate`'s own file."""
    yield "## Simulation\n\nThe file of `proper simulate` is another one, with these keys.\n"
    for text in _sections("", SimulationConfig):
        yield "### Simulation: " + text.removeprefix("## ").replace("Top level", "top level", 1)


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key that holds a value, as `section.key`, with its meaning, or an empty text."""
    meanings = _meanings(model)
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        if inner is None:
            yield prefix + name, field.description or meanings.get(name, "")
        else:
            yield from keys(inner, f"{prefix}{name}.")


def _sections(path: str, model: type[BaseModel]) -> Iterator[str]:
    yield _section(path, model, [name for name, f in model.model_fields.items() if _model_of(f.annotation) is None])
    for name, field in model.model_fields.items():
        inner, named = _model_of(field.annotation), _model_of_values(field.annotation)
        if inner is not None:
            yield from _sections(f"{path}.{name}" if path else name, inner)
        if named is not None:
            # Its own sections are those of the config, which have tables already.
            yield _section(f"{name}.NAME", named, list(named.model_fields))


def _section(path: str, model: type[BaseModel], names: Iterable[str]) -> str:
    text, meanings = attributes(inspect.getdoc(model) or "")[0], _meanings(model)
    fields = {name: model.model_fields[name] for name in names}
    rows = [
        (
            code(name),
            _type(field.annotation, field.metadata) if _model_of(field.annotation) is None else f"section `{name}`",
            code(_default(field)) if _model_of(field.annotation) is None else "",
            escape(field.description or meanings.get(name, "")),
        )
        for name, field in fields.items()
    ]
    title = f"## {code(path)}" if path else "## Top level"
    return f"{title}\n\n{docstring(text)}\n{table(('key', 'type', 'default', 'meaning'), rows)}"


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return what the docstrings of a section and of its base classes say about its keys."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= attributes(inspect.cleandoc(base.__doc__ or ""))[1]
    return found


def _model_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _model_of_values(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a mapping's values, if they have one."""
    return _model_of(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def _type(annotation: Any, metadata: Any = ()) -> str:
    """Return a type in words: `integer, at least 1`, or its choices as code."""
    text = _plain(annotation)
    limits = [limit for part in metadata for limit in _limits(part)]
    return ", ".join([text, *limits])


def _plain(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        return _type(inner, metadata)
    if origin is Literal:
        return ", ".join(code(str(value)) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_plain(part) for part in get_args(annotation))
    if origin in (list, tuple):
        return f"list of {_plain(get_args(annotation)[0])}"
    if origin is dict:
        values = get_args(annotation)[1]
        return "mapping of names to sections" if _model_of(values) else f"mapping to {_plain(values)}"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limits(part: Any) -> Iterator[str]:
    inner = getattr(part, "metadata", None)
    for one in inner if isinstance(part, FieldInfo) and inner else [part]:
        for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if getattr(one, name, None) is not None:
                yield f"{words} {getattr(one, name):g}"
        if getattr(one, "min_length", None) is not None:
            yield f"at least {one.min_length} entries"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if not re.fullmatch(r"[\w.-]+", value) else value
    return json.dumps(value)


def _presets() -> str:
    rows = (
        (code(preset), code(key), code(json.dumps(value).strip('"')))
        for preset, values in PRESETS.items()
        for key, value in _flat(values)
    )
    return (
        "## Presets\n\n`preset: NAME` sets several keys at once; a key in the file wins over the preset.\n\n"
        + table(("preset", "key", "value"), rows)
    )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
