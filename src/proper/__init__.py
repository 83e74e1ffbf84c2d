"""Personalize a causal language model in three stages: population, groups, users.

    import proper
    run = proper.run("notes.yaml", out="runs/notes")
    model = proper.load(run)

Attributes are loaded on first use, so that `import proper` does not import torch. The package logs to the logger
`proper` and prints nothing; `logging.basicConfig(level=logging.INFO)` shows its messages and progress.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proper.api import load
    from proper.pipeline import run

__version__ = "0.2.0"
__all__ = ["__version__", "load", "run"]

# A program that does not configure logging sees no message; without this, Python would print those of level WARNING.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOME = {"load": "proper.api", "run": "proper.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'proper' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
