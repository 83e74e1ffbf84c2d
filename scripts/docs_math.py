"""Equations of the documentation site: a fenced block `math` of LaTeX becomes MathML, which browsers draw themselves.

`zensical.toml` names `mathml` as the formatter of such blocks; `make docs` puts this folder on the import path.
"""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def mathml(source: str, *_: Any, **__: Any) -> str:
    """Return the block's equations as MathML, one per line that is not empty.

    Args:
        source: LaTeX without dollar signs, one equation a line.
    """
    lines = [line for line in source.splitlines() if line.strip()]
    return "<div class='math'>" + "".join(convert(line, display="block") for line in lines) + "</div>"
