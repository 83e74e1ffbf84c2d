"""Reference of the command line, read from the typer application."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import typer

from docs_reference.markdown import NOTE, code, escape, table
from proper.cli.app import app

INTRODUCTION = """\
Results go to stdout or files, everything else to stderr. Exit codes: 0 done, 1 failed, 2 bad input or usage,
130 interrupted. `proper COMMAND --help` shows the same text in a terminal.
"""


def page() -> str:
    """Return the page: one section per command, with arguments, options and examples."""
    sections = [_section(name, command) for name, command in commands()]
    listing = table(
        ("command", "purpose"),
        ((f"[{code(f'proper {name}')}](#{_anchor(name)})", _first_line(command)) for name, command in commands()),
    )
    return "\n".join([NOTE, "# Command line\n", INTRODUCTION, listing, *sections])


def commands() -> Iterator[tuple[str, Any]]:
    """Yield every command that runs something, with its name without `proper`."""
    yield from _walk("", typer.main.get_command(app))


def _walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from _walk(f"{path} {name}".strip(), inner)


def _section(name: str, command: Any) -> str:
    parts = [f"## proper {name} {{ #{_anchor(name)} }}\n", _usage(name, command), _text(command)]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    if arguments:
        named = ((code(_metavar(one)), escape(one.help or "")) for one in arguments)
        parts.append(table(("argument", "meaning"), named))
    if options:
        rows = ((_option(one), code(_default(one)), escape(one.help or "")) for one in options)
        parts.append(table(("option", "default", "meaning"), rows))
    if command.epilog:
        examples = inspect.cleandoc(command.epilog.replace("\b", "")).removeprefix("Examples:").strip("\n")
        parts.append(f"```text\n{inspect.cleandoc(examples)}\n```\n")
    return "\n".join(parts)


def _usage(name: str, command: Any) -> str:
    words = [f"proper {name}"]
    words += [_metavar(one) for one in command.params if one.param_type_name == "argument"]
    words += [f"{one.opts[0]} {_metavar(one)}" for one in command.params if _required(one)]
    if any(one.param_type_name == "option" and not one.required for one in command.params):
        words.append("[OPTIONS]")
    return f"```text\n{' '.join(words)}\n```\n"


def _required(one: Any) -> bool:
    return bool(one.param_type_name == "option" and one.required)


def _metavar(one: Any) -> str:
    """Return how an argument or an option's value is named: its metavar, its choices, or its type."""
    if one.metavar:
        return str(one.metavar)
    annotation = one.type_descriptor.annotation
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal:
            return "|".join(map(str, get_args(part)))
    return str(getattr(annotation, "__name__", annotation)).upper()


def _option(one: Any) -> str:
    names = [*one.opts, *one.secondary_opts]
    spelled = ", ".join(code(name) for name in names)
    if getattr(one, "is_flag", False):
        return spelled
    return f"{spelled} {code(_metavar(one))}"


def _default(one: Any) -> str:
    if one.required:
        return "required"
    if getattr(one, "is_flag", False):
        return "on" if one.default is True else "off"
    if one.default in (None, "", ()) or callable(one.default):
        return ""
    if isinstance(one.default, list | tuple):
        return ",".join(str(part) for part in one.default)
    return str(getattr(one.default, "value", one.default))


def _text(command: Any) -> str:
    return escape(inspect.cleandoc(command.help or "").replace("\b", "")) + "\n"


def _first_line(command: Any) -> str:
    return escape(inspect.cleandoc(command.help or "").split("\n\n")[0])


def _anchor(name: str) -> str:
    return "proper-" + name.replace(" ", "-")
