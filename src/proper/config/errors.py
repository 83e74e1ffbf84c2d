"""One-line error messages from pydantic validation errors of a config, and which of its keys hold text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from proper.errors import did_you_mean

_EXPECTED = "Input should be "


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line that names the key of the first problem and counts the others.

    Args:
        error: pydantic's error.
        model: the validated model, with nested sections.

    Returns:
        One line. An unknown key is reported first, as it may be the reason why another key is missing, together with
        the nearest known key.
    """
    problems: dict[str, list[ErrorDetails]] = {}
    # The first of several tasks is also the section `data`, so a problem there is reported twice.
    for problem in sorted(
        error.errors(), key=lambda one: (one["type"] != "extra_forbidden", one["loc"][:1] != ("tasks",))
    ):
        # A value that matches no branch of a union counts as one problem, not one per branch.
        problems.setdefault(".".join(_names(problem, model)) or "config", []).append(problem)
    key, branches = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if branches[0]["type"] == "extra_forbidden":
        known = _keys_beside(key.split("."), model)
        return f"unknown key '{key}'; {did_you_mean(key.rpartition('.')[2], known)}{more}"
    if branches[0]["type"] == "missing":
        return f"'{key}' is missing{more}"
    return f"'{key}': {_complaint(branches)}{more}"


def _names(problem: ErrorDetails, model: type[BaseModel]) -> list[str]:
    """Return the path of keys to a problem, without the list indices and union branches in pydantic's locations."""
    names: list[str] = []
    section: type[BaseModel] | None = model
    named = False
    for part in problem["loc"]:
        if section is None:
            break
        if named:
            names.append(str(part))
            named = False
        elif part in section.model_fields:
            names.append(str(part))
            annotation = section.model_fields[str(part)].annotation
            section, named = _section(annotation), get_origin(annotation) is dict
        elif problem["type"] in {"extra_forbidden", "invalid_key"}:
            names.append(str(part))
    return names


def _complaint(branches: Sequence[ErrorDetails]) -> str:
    """Return what the value should be; a broken validation rule is reported in preference to a type mismatch."""
    messages = list(dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in branches))
    rules = [message for message in messages if not message.startswith(_EXPECTED)]
    if rules:
        return rules[0][:1].lower() + rules[0][1:]
    wanted = (message.removeprefix(_EXPECTED).partition(", unable to")[0] for message in messages)
    plain = (wish.partition(" or instance of")[0].replace("a valid dictionary", "a section of keys") for wish in wanted)
    return f"should be {' or '.join(plain)}, not {_short(branches[0]['input'])}"


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of a key, or None if the key has a plain value."""
    for choice in (annotation, *get_args(annotation)):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def takes_text(names: Sequence[str], model: type[BaseModel]) -> bool:
    """Return whether the setting at a path of keys is a text, or a text or null."""
    section: type[BaseModel] | None = model
    entry = False
    for name in names[:-1]:
        if entry:  # the name of an entry of a mapping, such as that of a task
            entry = False
            continue
        field = section.model_fields.get(name) if section is not None else None
        section = None if field is None else _section(field.annotation)
        entry = field is not None and get_origin(field.annotation) is dict
    field = section.model_fields.get(names[-1]) if section is not None and not entry else None
    return field is not None and field.annotation in (str, str | None)


def _keys_beside(names: Sequence[str], model: type[BaseModel]) -> list[str]:
    section = model
    for name in names[:-1]:
        # The name of an entry of a mapping is no key of the section.
        field = section.model_fields.get(name)
        section = _section(field.annotation if field is not None else None) or section
    return list(section.model_fields)
