"""The tables of results in README.md and docs/results/README.md, from the `results.json` files under docs/results.

    python scripts/results_table.py [FOLDER]

README.md has the short one: a line per data set. docs/results/README.md has a line per data set and stage, with the
main metric, its interval over users, and the step from the stage before with its Holm-adjusted p; and a line per
control, which tells information about the user from more training. All numbers are taken from the files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
NAMES = {"accuracy": "accuracy ↑", "mae": "MAE ↓", "rouge1": "ROUGE-1 ↑"}

SHORT = ("global-majority", "user-majority", "base", "population", "groups", "users")
"""The columns of the short table."""
CONTROLS = {
    "groups": {"population-more": "same training, no users", "groups-shared-e": "one embedding for all users"},
    "users": {
        "swapped": "another user's adapter",
        "shuffled": "shuffled user ids",
        "user-majority": "the user's majority answer",
    },
}
"""The controls of each stage, with a short description."""


def table(folder: Path = RESULTS) -> str:
    """Return the markdown table of all results in `folder`, by file name."""
    lines = ["| data set | stage | main metric [95 %] | step | p |", "|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        lines += rows(path.stem, json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(lines) + "\n"


def short(folder: Path = RESULTS) -> str:
    """Return the table of README.md: the stages beside the answers that need no model, one line per data set."""
    lines = ["| data set | metric | best constant | user's usual answer | base | population | groups | users |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    trivial = _trivial(folder)
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        own = {row["method"]: f"{row['value']:.3f}" for row in results["metrics"] if row["primary"]}
        values = {**trivial.get(path.stem, {}), **own}
        metric = next(NAMES[row["metric"]] for row in results["metrics"] if row["primary"])
        cells = [values.get(method, "") for method in SHORT]
        lines.append(f"| {path.stem} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _trivial(folder: Path) -> dict[str, dict[str, str]]:
    """Return the values of the answers without a model, by data set, from the jobs that compared them.

    They are used where a result has no such rows of its own; the queries of such a job can differ from the result's.
    """
    found: dict[str, dict[str, str]] = {}
    for path in sorted((folder / "findings").glob("controls-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in results["metrics"] if row["primary"] and row["method"] in SHORT[:2]]
        found[Path(results["config"]).stem] = {row["method"]: f"{row['value']:.3f}" for row in rows}
    return found


def controls(folder: Path = RESULTS) -> str:
    """Return the markdown table of the controls in `folder`/findings."""
    lines = ["| data set | stage | against | value | difference [95 %] | p |", "|---|---|---|---|---|---|"]
    for path in sorted((folder / "findings").glob("controls-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        values = {row["method"]: row["value"] for row in results["metrics"] if row["primary"]}
        for row in results["comparisons"]:
            description = CONTROLS.get(row["method"], {}).get(row["against"])
            if row["primary"] and description is not None:
                pair = f"{row['method']} {values[row['method']]:.3f} | `{row['against']}`, {description}"
                lines.append(
                    f"| {Path(results['config']).stem} | {pair} | {values[row['against']]:.3f} | {_difference(row)} |"
                )
    return "\n".join(lines) + "\n"


def rows(name: str, results: dict[str, Any]) -> list[str]:
    """Return the lines of one run."""
    steps = {row["method"]: row for row in results["comparisons"] if row["family"] == "primary"}
    lines = []
    for row in results["metrics"]:
        if row["primary"]:
            low, high = row["ci95"]
            value = f"{NAMES[row['metric']]} {row['value']:.3f} [{low:.3f}, {high:.3f}]"
            lines.append(f"| {name} | {row['method']} | {value} | {_step(steps.get(row['method']))} |")
    return lines


def _step(step: dict[str, Any] | None) -> str:
    return "| " if step is None else _difference(step)


def _difference(row: dict[str, Any]) -> str:
    low, high = row["ci95"]
    p = "< .001" if row["p_adjusted"] < 0.001 else f"{row['p_adjusted']:.3f}".replace("0.", ".", 1)
    return f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] ({100 * row['relative']:+.1f} %) | {p}"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print("\n".join((short(folder), table(folder), controls(folder))), end="")
