"""From a template of this folder and values to one HTML page. Knows nothing about what a page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from proper.reports import formats, svg


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return the page; text is escaped, and a value that the template asks for must be there."""
    environment = Environment(
        loader=PackageLoader("proper.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = {"method_name": formats.method_name, "key": svg.key, "shapes": svg.shapes()}
    return environment.get_template(template).render({**shared, **values})
