"""Results of a run on stdout: a table of the methods' main metric and gains, then the path of the report.

Reads the plain values of results.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from proper.json_records import REMOVE_IT, read_record
from proper.run_folder import STAGE_METHODS, RunFolder

_STANDINGS = {"best": "   best", "tied": "   not significantly different from the best"}


def results_table(results: Mapping[str, Any]) -> list[str]:
    """Return lines for a terminal: of each task a heading, its methods in the order of `results`, its trivial wins."""
    rows = [row for row in results.get("metrics", []) if row.get("primary")]
    several = {row["name"]: row for row in results.get("tasks", [])}
    lines: list[str] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == task]
        lines.append(_heading(here[0]))
        width = max(len(row["method"]) for row in here)
        steps = {
            step["method"]: step
            for step in results.get("comparisons", [])
            if step["task"] == task and step.get("family") == "primary" and step["metric"] == here[0]["metric"]
        }
        shown = [_method(row, steps.get(row["method"]), width) for row in here]
        # The best method is marked only if there are others than the four stages.
        others = set(map(_name, here)) - set(STAGE_METHODS)
        marks = [_STANDINGS.get(row.get("standing"), "") if others else "" for row in here]
        kinds = ["   trivial" if row.get("trivial") else "" for row in here]
        lines += [f"{line}{kind}{mark}" for line, kind, mark in zip(shown, kinds, marks, strict=True)]
        lines += several.get(task, {}).get("trivial", {}).get("sentences", [])
    return [*lines, *results.get("trivial", {}).get("sentences", [])]


def print_results(folder: Path) -> None:
    """Print the table of results, if there are any, and the report's path, or the run folder if there is no report."""
    run = RunFolder(folder)
    if run.results.is_file():
        for line in results_table(read_record(run.results, REMOVE_IT)):
            typer.echo(line)
    typer.echo(run.report if run.report.is_file() else folder)


def _name(row: Mapping[str, Any]) -> str:
    return str(row["method"])


def _heading(row: Mapping[str, Any]) -> str:
    better = "higher" if row["higher_is_better"] else "lower"
    seeds = row["seeds"] if isinstance(row["seeds"], int) else len(row["seeds"])
    repeats = f", {seeds} seeds" if seeds > 1 else ""
    count = f"{row['users']} users, {row['queries']} queries{repeats}"
    return f"{row['task']}: {row['metric']}, {better} is better; {count}"


def _method(row: Mapping[str, Any], step: Mapping[str, Any] | None, width: int) -> str:
    line = f"  {row['method']:<{width}}  {row['value']:.4f}{_interval(row.get('ci95'))}"
    if step is None:
        return line
    relative = "" if step.get("relative") is None else f", {_percent(step['relative'])}"
    chance = step.get("p_adjusted") if step.get("p_adjusted") is not None else step.get("p_value")
    p = "" if chance is None else ", p < .001" if chance < 0.001 else f", p = {chance:.3f}".replace("0.", ".", 1)
    small = step.get("resolvable") is not None and abs(step["difference"]) < step["resolvable"]
    p += ", not resolvable here" if small and (chance is None or chance >= 0.05) else ""
    return f"{line}   {step['difference']:+.4f}{_interval(step.get('ci95'))} against {step['against']}{relative}{p}"


def _percent(relative: float) -> str:
    return f"{100 * abs(relative):.1f} % {'better' if relative >= 0 else 'worse'}"


def _interval(bounds: list[float | None] | None) -> str:
    """Return an interval; nothing if there is none, as of one user."""
    return "" if bounds is None or None in bounds else f" [{bounds[0]:.4f}, {bounds[1]:.4f}]"
