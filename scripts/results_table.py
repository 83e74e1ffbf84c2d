"""The tables of results in README.md and docs/results/README.md, from the `results.json` files under docs/results.

    python scripts/results_table.py [FOLDER]

README.md has the main table, of SmolLM2-135M. docs/results/README.md has the short table, a line per data set; a line
per data set and stage, with the main metric, its interval over users, and the step from the stage before with its
Holm-adjusted p; and a line per control, which tells information about the user from more training. All numbers are
taken from the files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
NAMES = {"accuracy": "accuracy ↑", "mae": "MAE ↓", "rouge1": "ROUGE-1 ↑"}

MAIN = {
    "HuffPost, accuracy ↑": "main-huffpost-label",
    "Git's folders, accuracy ↑": "main-git-area",
    "MovieLens, MAE ↓": "main-movielens-rating",
    "Git's subject lines, ROUGE-1 ↑": "main-git-subject",
}
"""The columns of the main table, and the files of their numbers."""
MAIN_ROWS = {
    "best constant": "global-majority",
    "first words of the input": "lead",
    "user's usual answer": "user-majority",
    "the same, from the items that the adapter was trained on": "user-majority-same",
    "user prior": "prior",
    "linear head and prior": "head+prior",
    "base": "base",
    "population": "population",
    "groups": "groups",
    "**users**": "users",
    "another user's adapter (`swapped`)": "swapped",
    "`population-more`: the steps of groups without users": "population-more",
}
"""The rows of the main table, and the method of each; docs/findings.md has all methods."""

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


def main_table(folder: Path = RESULTS) -> str:
    """Return the main table of README.md: methods by data set, with intervals; * marks rows of fewer seeds."""
    columns = {}
    for head, name in MAIN.items():
        path = folder / "findings" / f"{name}.json"
        columns[head] = _column(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for title, method in MAIN_ROWS.items():
        lines.append(f"| {title} | {' | '.join(column.get(method, '') for column in columns.values())} |")
    return "\n".join(lines) + "\n"


def _column(results: dict[str, Any]) -> dict[str, str]:
    seeds = {method: len(cells) for method, cells in results["cells"].items()}
    found = {}
    for row in results["metrics"]:
        if row["primary"]:
            low, high = row["ci95"]
            star = "*" if seeds[row["method"]] < max(seeds.values()) else ""
            found[row["method"]] = f"{row['value']:.3f} [{low:.3f}, {high:.3f}]{star}"
    return found


def table(folder: Path = RESULTS) -> str:
    """Return the markdown table of all results in `folder`, by file name."""
    lines = ["| data set | stage | main metric [95 %] | step | p |", "|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        lines += rows(path.stem, json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(lines) + "\n"


def short(folder: Path = RESULTS) -> str:
    """Return the short table: the stages beside the answers that need no model, one line per data set."""
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
    print("\n".join((main_table(folder), short(folder), table(folder), controls(folder))), end="")
