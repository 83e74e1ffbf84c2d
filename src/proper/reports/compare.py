"""Comparison report of two runs: one HTML page and the same numbers as CSV.

Measurements come in as plain values; configs, costs and routing are read from the two folders. No model is loaded.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper.files import write_text
from proper.reports import figures, tables
from proper.reports.formats import (
    METHODS,
    duration,
    method_name,
    metric_name,
    p_text,
    percent,
    plain,
    plural,
    safe_name,
    signed,
    size,
    span,
)
from proper.reports.html import render
from proper.reports.load import RunFiles, load_run
from proper.reports.reading import interval, mapping, number, objects
from proper.reports.tables import Table
from proper.run_folder import RunFolder

COLUMNS = (
    *("method", "metric", "primary", "higher_is_better"),
    *("first", "first_low", "first_high", "second", "second_low", "second_high"),
    *("difference", "low", "high", "relative", "p_value", "p_adjusted", "resolvable", "users", "queries", "test"),
)


@dataclass(frozen=True)
class RunPair:
    """Two runs, their display names, and the rows of `evaluation.side_by_side`."""

    runs: tuple[RunFiles, RunFiles]
    names: tuple[str, str]
    found: Mapping[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per method and metric, metric by metric, the main one first."""
        rows = objects(self.found.get("rows"))
        metrics = list(dict.fromkeys(row["metric"] for row in sorted(rows, key=lambda row: not row.get("primary"))))
        return sorted(rows, key=lambda row: metrics.index(row["metric"]))

    @property
    def main(self) -> list[dict[str, Any]]:
        """The rows of the main metric."""
        return [row for row in self.rows if row.get("primary")]


def write_comparison(first: Path, second: Path, found: Mapping[str, Any]) -> list[Path]:
    """Write `compare-NAME.html` and `.csv`, NAME being the second folder's, into the first; return both paths.

    Args:
        first: the run folder that receives the page.
        second: the other run folder.
        found: the result of `evaluation.side_by_side.compare_runs`.

    Raises:
        RunFolderError: a file of either run is not readable.
    """
    both = RunPair((load_run(first), load_run(second)), _names(first.resolve(), second.resolve()), found)
    page, text = render("compare.html.j2", gather(both)), csv_text(both)
    name = safe_name(second.resolve().name)
    paths = [RunFolder(first).comparison(name, ending) for ending in ("html", "csv")]
    for path, content in zip(paths, (page, text), strict=True):
        write_text(path, content)
    return paths


def gather(both: RunPair) -> dict[str, Any]:
    """Return the template's values, section by section."""
    task = mapping(both.found.get("task"))
    main = both.main
    return {
        "names": both.names,
        "task": str(task.get("name") or task.get("kind") or ""),
        "summary": summary(both),
        "tiles": _tiles(both),
        "values": figures.values(main, both.names),
        "forest": figures.forest(main, both.names),
        "scores": scores(both),
        "missing_pairs": {method_name(name): why for name, why in mapping(both.found.get("missing")).items()},
        "others": [sorted(_only(both, side)) for side in (0, 1)],
        "settings": settings(both),
        "cost": cost(both),
        "routing": routing(both),
        "heats": [(name, figures.heat(run.routed, name)) for name, run in zip(both.names, both.runs, strict=True)],
        "metadata": metadata(both),
    }


def summary(both: RunPair) -> str:
    """Return one sentence that says which run is better for which methods, as far as the tests show it."""
    tested = [row for row in both.main if number(row.get("p_adjusted")) is not None]
    if not tested:
        return "The runs have no method whose predictions can be paired."
    shown: dict[str, list[str]] = {"better": [], "worse": []}
    for row in tested:
        result = verdict(row)
        if result in shown:
            shown[result].append(method_name(str(row["method"])))
    if not any(shown.values()):
        return f"No measurable difference in any of {plural(len(tested), 'method')}."
    parts = [f"{result} for {', '.join(names)}" for result, names in shown.items() if names]
    return f"{both.names[0]} against {both.names[1]}: {' and '.join(parts)}."


def verdict(row: Mapping[str, Any]) -> str:
    """Return the verdict on the first run's difference from the second: better, worse, or not shown."""
    p, difference = number(row.get("p_adjusted")), number(row.get("difference"))
    if p is None or difference is None:
        return "not paired"
    if p < 0.05 and difference:
        return "better" if (difference > 0) == bool(row.get("higher_is_better")) else "worse"
    resolvable = number(row.get("resolvable"))
    return "not resolvable here" if resolvable is not None and abs(difference) < resolvable else "not significant"


def scores(both: RunPair) -> Table | None:
    """Return every common method and metric: both values with intervals, and the paired difference."""
    lines, last = [], ""
    for row in both.rows:
        metric = str(row["metric"])
        arrow = "↑" if row.get("higher_is_better") else "↓"
        sides = [mapping(row.get(side)) for side in ("first", "second")]
        cells = [f"{plain(number(side.get('value')))} {span(interval(side.get('ci95')))}" for side in sides]
        difference = f"{signed(number(row.get('difference')))} {_interval(row)}".removesuffix(" –")
        p = number(row.get("p_adjusted"))
        tests = [percent(number(row.get("relative")), sign=True), "–" if p is None else p_text(p), verdict(row)]
        title = f"{metric_name(metric)} {arrow}" if metric != last else ""
        lines.append([title, method_name(str(row["method"])), *cells, difference, *tests])
        last = metric
    head = ["metric", "method", *both.names, "difference", "relative", "p, adjusted", "verdict"]
    return Table(head, lines, frozenset({0, 1, 7}), _score_note(both)) if lines else None


def _interval(row: Mapping[str, Any]) -> str:
    return span(interval(row.get("ci95")), sign=True)


def _score_note(both: RunPair) -> str:
    paired = next((row for row in both.rows if row.get("users") is not None), None)
    note = f"Differences are {both.names[0]} minus {both.names[1]}; relative is positive where the first is better. "
    if paired is None:
        return note
    pairs = [pair for pair in both.found.get("seeds") or [] if isinstance(pair, list)]
    seeds = ", ".join(str(one) if one == other else f"{one} with {other}" for one, other in pairs)
    note += f"Paired over the {plural(int(paired['users']), 'user')} and {plural(int(paired['queries']), 'query')} "
    note += f"of both, seeds {seeds}; {paired['test']}; Holm-adjusted over the methods of the main metric, and over "
    return note + "all other rows."


def settings(both: RunPair) -> Table | None:
    """Return the settings in which the configs differ; None if there are none."""
    one, other = (dict(_flat(run.settings)) for run in both.runs)
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    lines = [[name, _shown(one.get(name)), _shown(other.get(name))] for name in names]
    return Table(["setting", *both.names], lines, frozenset({0, 1, 2})) if lines else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def cost(both: RunPair) -> Table | None:
    """Return the cost per user of each method of both runs."""
    sides = [{str(row.get("method")): row for row in run.rows("cost")} for run in both.runs]
    kinds = (("parameters_per_user", _whole), ("bytes_per_user", size), ("train_seconds_per_user", duration))
    lines = []
    for method in (method for method in sides[0] if method in sides[1]):
        cells = [show(number(side[method].get(key))) for key, show in kinds for side in sides]
        speeds = [plain(number(side[method].get("tokens_per_second")), 0) for side in sides]
        lines.append([method_name(method), *cells, *speeds])
    titles = ("parameters per user", "bytes per user", "training time per user", "tokens/s")
    head = ["method", *(f"{title}, {letter}" for title in titles for letter in "AB")]
    note = f"A: {both.names[0]}, B: {both.names[1]}. Times are of the machine on which each run was made."
    return Table(head, lines, frozenset({0}), note) if lines else None


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def routing(both: RunPair) -> Table | None:
    """Return the routing figures of both runs."""
    names = {
        "experts": "experts",
        "entropy": "entropy of gates, nats",
        "user_expert_mutual_information": "mutual information of user and expert, nats",
        "constraint_cosine": "mean cosine of two users' gates",
        "nmi": "agreement with the true groups, NMI",
    }
    one, other = (run.part("routing") for run in both.runs)
    known = [key for key in names if number(one.get(key)) is not None or number(other.get(key)) is not None]
    lines = [[names[key], *(_figure(side.get(key)) for side in (one, other))] for key in known]
    used = [side.get("utilization") for side in (one, other)]
    if any(isinstance(shares, list) for shares in used):
        lines.append(["share of each expert", *(_shares(shares) for shares in used)])
    return Table(["routing", *both.names], lines, frozenset({0})) if lines else None


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else plain(number(value))


def _shares(value: Any) -> str:
    return " · ".join(plain(number(share), 2) for share in value) if isinstance(value, list) else "–"


def metadata(both: RunPair) -> Table | None:
    """Return the metadata of both runs, side by side."""
    one, other = (dict(tables.metadata(run)) for run in both.runs)
    lines = [[name, one.get(name, "–"), other.get(name, "–")] for name in dict.fromkeys([*one, *other])]
    return Table(["", *both.names], lines, frozenset({0, 1, 2})) if lines else None


def csv_text(both: RunPair) -> str:
    """Return every row of the comparison as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in both.rows:
        cells: dict[str, Any] = {**row}
        for side, name in (("first", "first"), ("second", "second")):
            score = mapping(row.get(side))
            low, high = interval(score.get("ci95")) or (None, None)
            cells |= {name: score.get("value"), f"{name}_low": low, f"{name}_high": high}
        low, high = interval(row.get("ci95")) or (None, None)
        writer.writerow({**cells, "low": low, "high": high})
    return text.getvalue()


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Return display names of both runs: their folder names, with the parent folder if those are equal."""
    if first.name != second.name:
        return first.name, second.name
    return f"{first.parent.name}/{first.name}", f"{second.parent.name}/{second.name}"


def _only(both: RunPair, side: int) -> set[str]:
    own, others = ({row.method for row in both.runs[at].metrics} for at in (side, 1 - side))
    return {METHODS.get(method, method) for method in own - others}


def _tiles(both: RunPair) -> list[tuple[str, str]]:
    paired: Sequence[dict[str, Any]] = [row for row in both.main if row.get("users") is not None]
    tiles = [("A", both.names[0]), ("B", both.names[1])]
    if paired:
        tiles += [("common users", f"{paired[0]['users']:,}"), ("common queries", f"{paired[0]['queries']:,}")]
    return tiles
