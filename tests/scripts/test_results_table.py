"""README.md and docs/results/README.md show the committed results and no others, the controls with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts import results_table

ROOT = Path(__file__).parents[2]


def row(method: str, value: float) -> dict[str, Any]:
    return {"method": method, "metric": "mae", "value": value, "primary": True}


def test_the_readme_s_table_is_that_of_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    full = (ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8")
    assert results_table.main_table() in readme
    assert results_table.short() in full and results_table.table() in full and results_table.controls() in full
    assert results_table.controls().count("| `population-more`") >= 1


def test_rows_without_a_model_are_a_job_s_only_where_the_result_has_none(tmp_path: Path) -> None:
    (tmp_path / "findings").mkdir()
    job = {"config": "configs/films.yaml", "metrics": [row("global-majority", 0.9), row("user-majority", 0.8)]}
    (tmp_path / "findings" / "controls-films.json").write_text(json.dumps(job), encoding="utf-8")
    own = {"metrics": [row("users", 0.5), row("global-majority", 0.7)]}
    (tmp_path / "films.json").write_text(json.dumps(own), encoding="utf-8")
    assert "| films | MAE ↓ | 0.700 | 0.800 |" in results_table.short(tmp_path)
