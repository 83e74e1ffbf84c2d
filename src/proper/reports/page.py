"""Rendering of this folder's Jinja templates to HTML pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from proper.reports import formats, svg


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return the rendered page; text is escaped, and a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("proper.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = {"method_name": formats.method_name, "key": svg.key, "shapes": svg.shapes()}
    return environment.get_template(template).render({**shared, **values})
