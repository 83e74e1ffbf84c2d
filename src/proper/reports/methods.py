"""Comparison of methods: a table with the best marked, cost against quality, ablations, and `methods.csv`.

A method belongs to an ablation by its name; the run's own stage is shown among its variants.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from proper.files import write_text
from proper.reports import charts
from proper.reports.charts import NAMES, TICKS, Chart, canvas
from proper.reports.figures import columns_with_values, hide_ticks
from proper.reports.formats import method_name, metric_name, of_task, plain, plural, signed, size, span
from proper.reports.load import ReportedComparison, ReportedMetric, RunFiles, load_run
from proper.reports.narrative import is_higher_better, lost_controls, outcome, primary_metrics, verdict
from proper.reports.reading import count, mapping, number
from proper.reports.tables import Table
from proper.run_folder import STAGE_METHODS, RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONSTRAINTS = {"constraint-experts": "experts", "groups-no-constraint": "none", "released": "released preset"}
ROUTERS = {"users-residual": "residual", "users-paper": "paper", "users-no-router": "none (3a)"}
EXPERTS = re.compile(r"^groups\[groups\.experts=(\d+)\]$")
EMBEDDING = re.compile(r"^groups\[groups\.user_embedding=(\d+)\]$")
COLUMNS = (
    *("task", "method", "metric", "value", "low", "high", "value_users", "standing", "users", "queries", "seeds"),
    *("seed_spread", "against", "difference", "p_value", "p_adjusted", "resolvable"),
    *("parameters_per_user", "bytes_per_user", "train_seconds_per_user", "train_seconds"),
    *("tokens_per_second", "tokens_per_query", "truncated_prompts"),
)


def methods_table(run: RunFiles) -> Table | None:
    """Return one row per method on the main metric; None if only stages were compared."""
    rows = primary_metrics(run) if run.metrics else []
    if all(row.method in STAGE_METHODS for row in rows):
        return None
    costs = {str(row.get("method")): row for row in run.rows("cost")}
    several = len({row.task for row in rows}) > 1
    lines = [_method_cells(run, row, costs.get(row.method, {}), several) for row in _ranked(rows)]
    metrics = {metric_name(row.metric): "higher" if row.higher_is_better else "lower" for row in rows}
    said = "; ".join(f"{metric[0].upper() + metric[1:]}, {better} is better" for metric, better in metrics.items())
    note = (
        f"{said}; best first and bold. ≈: tied with the best, as "
        "the 95 % interval of the difference, paired by user, contains 0. Not resolvable here: the difference is below "
        "the minimal detectable difference of these users and queries at 80 % power."
    )
    head = [
        "method",
        next(iter(metrics)) if len(metrics) == 1 else "main metric",
        "95 % interval",
        "seeds",
        "difference",
        "verdict",
        "compared",
        "bytes per user",
        "truncated prompts",
    ]
    return Table(head, lines, frozenset({0, 5, 6}), note)


def _method_cells(run: RunFiles, row: ReportedMetric, cost: Mapping[str, Any], with_task: bool) -> list[str]:
    found = _against(run, row)
    task = f"{row.task}: " if with_task else ""  # before the bold name, so not by `of_task`
    return [
        Markup("{}{}").format(task, _marked(method_name(row.method), row.standing)),
        _marked(plain(row.value), row.standing),
        span(row.interval),
        _spread(run, row),
        signed(found.difference) if found else "–",
        verdict(found, is_higher_better(run, row.metric)) if found else "",
        f"{method_name(found.method)} − {method_name(found.against)}" if found else "",
        size(number(cost.get("bytes_per_user"))),
        _cut(cost),
    ]


def cost_quality(run: RunFiles) -> Chart | None:
    """Draw the main metric over bytes stored per user; None with fewer than three methods of known cost."""
    kept = {str(row.get("method")): number(row.get("bytes_per_user")) for row in run.rows("cost")}
    rows = primary_metrics(run) if run.metrics else []
    tasks = list(dict.fromkeys(row.task for row in rows))
    rows = [row for row in rows if row.task == tasks[0] and kept.get(row.method) is not None]
    if len(rows) < 3:
        return None
    sizes = [float(kept[row.method] or 0) for row in rows]
    metric, better = metric_name(rows[0].metric), "higher" if rows[0].higher_is_better else "lower"
    with canvas(f"{metric} of {plural(len(rows), 'method')} over bytes per user", 640, (300, TICKS)) as drawing:
        spots = _sizes_axis(drawing.axes, sizes)
        for index, (row, spot, amount) in enumerate(zip(rows, spots, sizes, strict=True)):
            tip = f"{method_name(row.method)}\n{metric} {plain(row.value)}\nbytes per user {size(amount)}"
            shape = charts.marker(index)
            charts.whiskers(drawing, [spot], [(row.value, row.interval)], [tip], index, 60, shape)
        charts.value_axis(drawing.axes)
        hide_ticks(drawing.axes)
        charts.titles(drawing.axes, f"{metric} ({better} is better)", "bytes per user")
    corner = "top" if rows[0].higher_is_better else "bottom"
    caption = (
        f"Towards the {corner} left: better and smaller. Bars are 95 % intervals over users. Sizes are logarithmic; "
    )
    caption += "methods that store nothing per user are drawn at the left end."
    legend = charts.keys([(index, method_name(row.method)) for index, row in enumerate(rows)])
    return Chart(of_task(run.first_task, "Cost against quality"), drawing.svg + legend, caption)


def _sizes_axis(axes: Axes, sizes: Sequence[float]) -> list[float]:
    """Make the horizontal axis logarithmic, with 0 bytes at an eighth of the smallest size; return the positions."""
    least = min((amount for amount in sizes if amount > 0), default=1.0)
    nothing = least / 8
    spots = [amount or nothing for amount in sizes]
    ticks = [tick for tick in charts.log_axis(axes, spots, across=True) if tick >= least * 0.8]
    free = [] if all(sizes) else [nothing]
    axes.set_xticks(free + ticks, ["nothing" for _ in free] + [size(tick) for tick in ticks])
    return spots


def claim_story(claim: Mapping[str, Any]) -> list[str]:
    """Return sentences on whether the controls support a claim of personalization."""
    if not claim:
        return []
    missing = [method_name(str(name)) for name in claim.get("missing") or []]
    if claim.get("claimed") is True:
        return ["Every control is beaten at p < .05: the gain comes from information about the user."]
    story = []
    if claim.get("undertrained"):
        story.append("Personalization cannot be claimed: population is no better than the best constant.")
    if lost := lost_controls(claim):
        story.append(f"Personalization cannot be claimed. No measurable gain: {lost}.")
    if missing:
        story.append(f"Controls that are missing: {', '.join(missing)}.")
    return story


def write_methods_csv(folder: Path) -> Path:
    """Write every method's scores, comparison and costs to `methods.csv` beside `results.json`, atomically.

    Raises:
        RunFolderError: results.json is missing or is not JSON.
    """
    run = load_run(folder)
    costs = {str(row.get("method")): row for row in run.rows("cost")}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in run.metrics:
        low, high = row.interval or (None, None)
        cells: dict[str, Any] = {name: getattr(row, name, None) for name in COLUMNS[:11]}
        found = _against(run, row)
        if found is not None:
            cells |= {name: getattr(found, name) for name in ("difference", "p_value", "p_adjusted", "resolvable")}
            cells["against"] = f"{found.method} - {found.against}"
        by_seed = _by_seed(run, row)
        cells |= {"low": low, "high": high, "seed_spread": max(by_seed) - min(by_seed) if len(by_seed) > 1 else None}
        writer.writerow({**costs.get(row.method, {}), **cells})
    path = RunFolder(folder).methods_table
    write_text(path, text.getvalue())
    return path


def _ranked(rows: Sequence[ReportedMetric]) -> list[ReportedMetric]:
    tasks = list(dict.fromkeys(row.task for row in rows))
    return sorted(rows, key=lambda row: (tasks.index(row.task), -row.value if row.higher_is_better else row.value))


def _marked(text: str, standing: str) -> Markup:
    if standing == "best":
        return Markup("<b>{}</b>").format(text)
    return escape(f"{text} ≈" if standing == "tied" else text)


def _against(run: RunFiles, row: ReportedMetric) -> ReportedComparison | None:
    """Return the comparison of a stage with the one before, or of the last stage with any other method."""
    here = (row.metric, row.task)
    same = {(one.method, one.against): one for one in run.comparisons if (one.metric, one.task) == here}
    last = next((stage for stage in reversed(STAGE_METHODS) if any(one.method == stage for one in run.metrics)), "")
    before = STAGE_METHODS[STAGE_METHODS.index(row.method) - 1] if row.method in STAGE_METHODS[1:] else ""
    return same.get((row.method, before)) or same.get((last, row.method))


def _by_seed(run: RunFiles, row: ReportedMetric) -> list[float]:
    for found in run.rows("metrics"):
        if (found.get("task"), found.get("method"), found.get("metric")) == (row.task, row.method, row.metric):
            values = found.get("by_seed")
            return [value for one in values if (value := number(one)) is not None] if isinstance(values, list) else []
    return []


def _spread(run: RunFiles, row: ReportedMetric) -> str:
    values = _by_seed(run, row)
    return f"{plain(min(values))} to {plain(max(values))}" if len(values) > 1 else "one"


def _cut(cost: Mapping[str, Any]) -> str:
    amount = number(cost.get("truncated_prompts"))
    return "–" if amount is None else f"{amount:.0f}"


@dataclass(frozen=True, slots=True)
class Family:
    """One ablation: `own` is the run's stage, labelled `setting`; `variant` maps another method to its setting."""

    title: str
    own: str
    setting: str
    variant: Callable[[str], str | None]
    what: str


def ablations(run: RunFiles) -> list[Chart]:
    """Draw each family for which the run scored its own stage and at least one variant."""
    rows = primary_metrics(run) if run.metrics else []
    rows = [row for row in rows if row.task == rows[0].task]
    drawn = [_ablation(family, rows, run) for family in _families(run)]
    return [chart for chart in drawn if chart is not None]


def _families(run: RunFiles) -> list[Family]:
    groups, users = mapping(run.settings.get("groups")), mapping(run.settings.get("users"))
    experts = count(run.part("routing").get("experts")) or count(groups.get("experts"))
    constraint, size = mapping(groups.get("constraint")).get("kind"), count(groups.get("user_embedding"))
    return [
        Family("Number of experts, E", "groups", _own(experts), _numbered(EXPERTS), "numbers of experts"),
        Family("Size of the user embedding, D", "groups", _own(size), _numbered(EMBEDDING), "embedding sizes"),
        Family("Constraint", "groups", _own(constraint), CONSTRAINTS.get, "constraints"),
        Family("Router of stage 3", "users", _own(users.get("router")), ROUTERS.get, "router forms"),
    ]


def _own(setting: object) -> str:
    return "this run's" if setting is None else str(setting)


def _numbered(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    def variant(method: str) -> str | None:
        found = pattern.search(method)
        return found[1] if found else None

    return variant


def _ablation(family: Family, rows: Sequence[ReportedMetric], run: RunFiles) -> Chart | None:
    own = next((row for row in rows if row.method == family.own), None)
    named = [(setting, row) for row in rows if (setting := family.variant(row.method)) is not None]
    if own is None or not named:
        return None
    named = _in_order([(family.setting, own), *named])
    metric, better = metric_name(own.metric), "higher" if own.higher_is_better else "lower"
    values = ", ".join(f"{setting} {plain(row.value)}" for setting, row in named)
    columns = [(setting, _below(row, own, run)) for setting, row in named]
    with canvas(f"{metric} by {family.title}: {values}", 290, (170, NAMES)) as drawing:
        columns_with_values(drawing, [row for _, row in named], columns, metric)
    caption = (
        f"{len(named)} {family.what}; {better} is better, bars are 95 % intervals over users. Below: difference from "
        f"{method_name(family.own).lower()} of this run, in brackets where the test does not show one."
    )
    return Chart(of_task(run.first_task, family.title), drawing.svg, caption)


def _in_order(named: list[tuple[str, ReportedMetric]]) -> list[tuple[str, ReportedMetric]]:
    """Sort numeric settings by value; keep the order of other settings, the run's own first."""
    if all(setting.isdigit() for setting, _ in named):
        return sorted(named, key=lambda pair: int(pair[0]))
    return named


def _below(row: ReportedMetric, own: ReportedMetric, run: RunFiles) -> str:
    if row.method == own.method:
        return "this run"
    pairs = {(own.method, row.method), (row.method, own.method)}
    tested = [
        one
        for one in run.comparisons
        if (one.method, one.against) in pairs and (one.metric, one.task) == (row.metric, row.task)
    ]
    text = signed(row.value - own.value)
    shown = any(outcome(one, is_higher_better(run, one.metric)) != "none" for one in tested)
    return text if shown else f"({text})"
