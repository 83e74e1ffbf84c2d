"""README.md and docs/results/README.md show the committed results and no others, the controls with them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]


def results_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_table", ROOT / "scripts" / "results_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(method: str, value: float) -> dict[str, Any]:
    return {"method": method, "metric": "mae", "value": value, "primary": True}


def test_the_readme_s_table_is_that_of_the_committed_results() -> None:
    module = results_table()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    full = (ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8")
    assert module.main_table() in readme
    assert module.short() in full and module.table() in full and module.controls() in full
    assert module.controls().count("| `population-more`") >= 1


def test_rows_without_a_model_are_a_job_s_only_where_the_result_has_none(tmp_path: Path) -> None:
    (tmp_path / "findings").mkdir()
    job = {"config": "configs/films.yaml", "metrics": [row("global-majority", 0.9), row("user-majority", 0.8)]}
    (tmp_path / "findings" / "controls-films.json").write_text(json.dumps(job), encoding="utf-8")
    own = {"metrics": [row("users", 0.5), row("global-majority", 0.7)]}
    (tmp_path / "films.json").write_text(json.dumps(own), encoding="utf-8")
    assert "| films | MAE ↓ | 0.700 | 0.800 |" in results_table().short(tmp_path)
