"""README.md and docs/results/README.md show the committed results and no others, the controls with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_s_table_is_that_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("results_table", ROOT / "scripts" / "results_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    full = (ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8")
    assert module.short() in readme
    assert module.table() in full and module.controls() in full
    assert module.controls().count("| `population-more`") >= 1
