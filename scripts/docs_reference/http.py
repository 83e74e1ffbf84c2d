"""Reference of the HTTP API, read from the server's OpenAPI document."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from docs_reference.markdown import NOTE, attributes, code, docstring, escape, table
from proper.inference.engine_thread import EngineThread
from proper.serving.app import ServeSettings, create_app
from proper.serving.keys import Keys

INTRODUCTION = """\
The routes of `proper serve`. A running server has the whole document at `/openapi.json`; [Serving](../serving.md)
explains how the routes behave. Requests and replies are JSON.
"""


def page() -> str:
    """Return the page: one section per route, then the schemas that they use."""
    document = openapi()
    schemas: dict[str, Any] = document["components"]["schemas"]
    routes = [_route(path, method, one) for path, method, one in operations(document)]
    models = [_schema(name, schema) for name, schema in sorted(schemas.items()) if not _internal(name)]
    return "\n".join([NOTE, "# HTTP API\n", INTRODUCTION, *routes, "## Schemas\n", *models])


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of a server; no model is loaded, since routes do not depend on one."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ServeSettings("run")
        app = create_app(cast(EngineThread, _NoRun()), Keys(Path(folder)), settings, log=lambda _: None)
        return app.openapi()


class _NoRun:
    """Stands for the engine, the model, the tokenizer and so on while routes are declared; there is no store."""

    store = None

    def __getattr__(self, _: str) -> _NoRun:
        return self

    def __call__(self) -> _NoRun:
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(("",))


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield path, method and description of every route but HEAD."""
    for path, methods in document["paths"].items():
        for method, one in methods.items():
            if method != "head":
                yield path, method.upper(), one


def _route(path: str, method: str, one: dict[str, Any]) -> str:
    parts = [f"## {method} {path}\n", docstring(one.get("description") or one.get("summary") or "")]
    parameters = one.get("parameters", [])
    if parameters:
        rows = (
            (code(each["name"]), each["in"], _type(each["schema"]), escape(each.get("description", "")))
            for each in parameters
        )
        parts.append(table(("parameter", "in", "type", "meaning"), rows))
    if "requestBody" in one:
        parts.append(f"Body: {_content(one['requestBody'])}\n")
    replies = (
        (status, escape(reply.get("description", "")), _content(reply)) for status, reply in one["responses"].items()
    )
    parts.append(table(("status", "meaning", "reply"), replies))
    return "\n".join(parts)


def _schema(name: str, schema: dict[str, Any]) -> str:
    text, meanings = attributes(schema.get("description", ""))
    parts = [f"### {name}\n", docstring(text)]
    required = set(schema.get("required", []))
    if schema.get("properties"):
        rows = (
            (
                code(key),
                _type(field),
                _default(key, field, required),
                escape(field.get("description") or meanings.get(key, "")),
            )
            for key, field in schema["properties"].items()
        )
        parts.append(table(("field", "type", "default", "meaning"), rows))
    elif "enum" in schema:
        parts.append("One of " + ", ".join(code(str(value)) for value in schema["enum"]) + ".\n")
    return "\n".join(parts)


def _default(key: str, field: dict[str, Any], required: set[str]) -> str:
    if key in required:
        return "required"
    return code(str(field["default"])) if field.get("default") is not None else ""


def _content(holder: dict[str, Any]) -> str:
    return ", ".join(
        f"{code(kind)} {_type(content.get('schema', {}))}".strip()
        for kind, content in holder.get("content", {}).items()
    )


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return name if _internal(name) else f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(part) for part in schema[key]))
    if "enum" in schema:
        return ", ".join(code(str(value)) for value in schema["enum"])
    if "const" in schema:
        return code(str(schema["const"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}".strip()
    return str(schema.get("type", "any"))


def _internal(name: str) -> bool:
    return name in ("HTTPValidationError", "ValidationError")
