"""The page of two runs and its CSV: what differs, who is better, and nothing that only the page knows."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from proper.reports.compare import RunPair, settings, summary, write_comparison
from proper.reports.load import load_run


def found(*rows: tuple[str, float | None, float | None]) -> dict[str, Any]:
    """What was measured: (method, difference, adjusted p) on accuracy, and a loss of each."""
    made = []
    for method, difference, p in rows:
        for metric, higher in (("accuracy", True), ("loss", False)):
            made.append(
                {
                    "method": method, "metric": metric, "primary": higher, "higher_is_better": higher,
                    "first": {"value": 0.6, "ci95": [0.5, 0.7]}, "second": {"value": 0.5, "ci95": None},
                    "difference": difference, "relative": difference, "ci95": difference and [difference - 0.1, 0.3],
                    "p_value": p, "p_adjusted": p, "test": "paired permutation over users", "resolvable": 0.05,
                    "users": difference and 60, "queries": difference and 300,
                }
            )  # fmt: skip
    return {"task": {"name": "notes"}, "seeds": [[0, 0], [1, 3]], "rows": made, "missing": {"oppu": "no <b>file</b>"}}


MEASURED = found(("population", 0.01, 0.8), ("groups", -0.12, 0.001), ("users", 0.1, 0.004), ("oppu", None, None))


@pytest.fixture
def pair(folder: Path) -> tuple[Path, Path]:
    """The run and another with other settings, fewer experts, and no base."""
    other = folder / "the <other>"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("the*"))
    for place, experts in ((folder, 5), (other, 2)):
        config = {"groups": {"experts": experts, "constraint": {"kind": "users"}}, "backbone": "proper-nano"}
        (place / "config.yaml").write_text(yaml.safe_dump(config))
    results = json.loads((other / "results.json").read_text())
    results["metrics"] = [row for row in results["metrics"] if row["method"] != "base"]
    results["routing"]["experts"] = 2
    (other / "results.json").write_text(json.dumps(results))
    return folder, other


def test_the_page_says_what_differs(pair: tuple[Path, Path], parse: Callable[[Path], Any]) -> None:
    page_path, _ = write_comparison(*pair, MEASURED)
    page = parse(page_path)
    assert not page.open and page_path.parent == pair[0]
    names = pair[0].name, "the <other>"
    assert f"{names[0]} against {names[1]}: better for Users and worse for Groups." in page.text["header"]
    scores = page.text["scores"]
    assert "−0.120 [−0.220, +0.300]" in scores and "not resolvable here" in scores and "p = .004" in scores
    assert "seeds 0, 1 with 3" in scores and "60 users and 300 queries" in scores
    assert "OPPU is not paired: no <b>file</b>." in scores and f"Only in {names[0]}: Backbone." in scores
    assert "groups.experts52" in page.text["settings"] and "constraint" not in page.text["settings"]
    assert "experts52" in page.text["routing"] and page.count("g", class_="cells") == 2
    assert "24.7 kB24.7 kB" in page.text["cost"]
    assert len({tip for tip in page.tips["scores"] if "Groups" in tip}) == 3  # two values and a difference


def test_every_number_is_in_the_csv(pair: tuple[Path, Path]) -> None:
    _, path = write_comparison(*pair, MEASURED)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and [row["metric"] for row in rows] == ["accuracy"] * 4 + ["loss"] * 4
    groups = next(row for row in rows if row["method"] == "groups")
    assert (groups["first"], groups["first_low"], groups["second"], groups["second_low"]) == ("0.6", "0.5", "0.5", "")
    assert (groups["difference"], groups["low"], groups["high"]) == ("-0.12", "-0.22", "0.3")
    assert groups["p_adjusted"] == "0.001"
    assert next(row for row in rows if row["method"] == "oppu")["difference"] == ""


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("users", 0.0, 1.0), ("groups", 0.1, 0.2)], "No measurable difference in any of 2 methods."),
        ([("users", None, None)], "The runs have no method whose predictions can be paired."),
        ([("users", 0.2, 0.001)], "A against B: better for Users."),
    ],
)
def test_the_summary_claims_only_what_was_shown(rows: Any, says: str, folder: Path) -> None:
    run = load_run(folder)
    assert summary(RunPair((run, run), ("A", "B"), found(*rows))) == says


def test_the_same_config_has_no_table(folder: Path) -> None:
    run = load_run(folder)
    assert settings(RunPair((run, run), ("A", "B"), MEASURED)) is None
