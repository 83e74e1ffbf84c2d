"""Method comparison: a table with the best marked, a scatter plot of cost against quality, and `methods.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from proper.files import write_text
from proper.reports.figures import Figure
from proper.reports.formats import method_name, metric_name, plain, plural, signed, size, span
from proper.reports.load import ReportedComparison, ReportedMetric, RunFiles, load_run
from proper.reports.narrative import is_higher_better, primary_metrics, verdict
from proper.reports.reading import number
from proper.reports.svg import COLOURS, Axis, Scale, chart, join, key, linear, logarithmic, percent, symbol, tag
from proper.reports.tables import Table
from proper.run_folder import LADDER, RunFolder

COLUMNS = (
    *("task", "method", "metric", "value", "low", "high", "value_users", "standing", "users", "queries", "seeds"),
    *("seed_spread", "against", "difference", "p_value", "p_adjusted", "resolvable"),
    *("parameters_per_user", "bytes_per_user", "train_seconds_per_user", "train_seconds"),
    *("tokens_per_second", "tokens_per_query", "truncated_prompts"),
)


def methods_table(run: RunFiles) -> Table | None:
    """Return one row per method on the main metric; None if only stages of the ladder were compared."""
    rows = primary_metrics(run) if run.metrics else []
    if all(row.method in LADDER for row in rows):
        return None
    costs = {str(row.get("method")): row for row in run.rows("cost")}
    several = len({row.task for row in rows}) > 1
    lines = []
    for row in _ranked(rows):
        found = _against(run, row)
        cost = costs.get(row.method, {})
        task = f"{row.task}: " if several else ""
        lines.append(
            [
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
        )
    metric, better = metric_name(rows[0].metric), "higher" if rows[0].higher_is_better else "lower"
    note = (
        f"{metric[0].upper() + metric[1:]}, {better} is better; best first and bold. ≈ cannot be told from the best: "
        "the 95 % interval of the difference, paired by user, holds 0. Not resolvable here: the difference is smaller "
        "than what these users and queries show with 80 % power."
    )
    head = ["method", metric, "95 % interval", "seeds", "difference", "verdict", "of", "kept a user", "cut prompts"]
    return Table(head, lines, frozenset({0, 5, 6}), note)


def cost_quality(run: RunFiles) -> Figure | None:
    """Draw the main metric over bytes kept per user; None with fewer than three methods of known cost."""
    kept = {str(row.get("method")): number(row.get("bytes_per_user")) for row in run.rows("cost")}
    rows = primary_metrics(run) if run.metrics else []
    tasks = list(dict.fromkeys(row.task for row in rows))
    rows = [row for row in rows if row.task == tasks[0] and kept.get(row.method) is not None]
    if len(rows) < 3:
        return None
    sizes = {row.method: float(kept[row.method] or 0) for row in rows}
    least = min((amount for amount in sizes.values() if amount > 0), default=1.0)
    across = _sizes_axis(sizes, least)
    up = linear([edge for row in rows for edge in (row.value, *(row.interval or ()))], pad=0.08)
    marks = [_priced(index, row, sizes[row.method], least / 8, (across.scale, up)) for index, row in enumerate(rows)]
    keys = [key(index, method_name(row.method)) for index, row in enumerate(rows)]
    metric, better = metric_name(rows[0].metric), "higher" if rows[0].higher_is_better else "lower"
    frame = tag("rect", x="0", y="0", width="100%", height="100%", class_="frame")
    label = f"{metric} of {plural(len(rows), 'method')} over bytes kept for a user"
    y = Axis(up, f"{metric} ({better} is better)")
    drawing = join([chart(frame, *marks, height=320, label=label, x=across, y=y), tag("p", *keys, class_="keys")])
    corner = "top" if rows[0].higher_is_better else "bottom"
    caption = (
        f"Towards the {corner} left: better for less. Bars are 95 % intervals over users; sizes are logarithmic, and "
    )
    caption += "what keeps nothing for a user stands apart at the left."
    return Figure("Cost against quality", drawing, caption)


def _sizes_axis(sizes: Mapping[str, float], least: float) -> Axis:
    """Return a logarithmic axis of bytes on which 0 bytes is drawn at an eighth of the smallest size."""
    nothing = least / 8
    scale = logarithmic([amount or nothing for amount in sizes.values()])
    real = tuple(tick for tick in scale.ticks if tick >= least * 0.8)
    free = any(not amount for amount in sizes.values())
    ticks = (nothing, *real) if free else real
    return Axis(
        replace(scale, ticks=ticks), "kept for a user", lambda tick: size(tick) if tick > nothing else "nothing"
    )


def _priced(index: int, row: ReportedMetric, amount: float, nothing: float, scales: tuple[Scale, Scale]) -> Markup:
    across, up = scales
    tip = f"{method_name(row.method)}\n{metric_name(row.metric)} {plain(row.value)}\nkept a user {size(amount)}"
    x, bar = across.at(amount or nothing), Markup("")
    if row.interval:
        low, high = (percent(100 - up.at(edge)) for edge in row.interval)
        bar = tag("line", x1=percent(x), x2=percent(x), y1=low, y2=high, class_=f"reach c{index % COLOURS}")
    return tag("g", bar, symbol(index, x, up.at(row.value)), data_tip=tip)


def claim_story(claim: Mapping[str, Any]) -> list[str]:
    """Return sentences on whether the controls support a claim of personalization."""
    if not claim:
        return []
    lost = [str(pair) for pair in claim.get("not_beaten") or []]
    missing = [method_name(str(name)) for name in claim.get("missing") or []]
    if claim.get("claimed") is True:
        return ["The controls are beaten, every one at p < .05: what was gained, was gained by knowing the user."]
    story = []
    if lost:
        pairs = "; ".join(" over ".join(method_name(name) for name in pair.split(" > ")) for pair in lost)
        story.append(f"Personalization cannot be claimed: no measurable gain of {pairs}.")
    if missing:
        story.append(f"Controls that were not run: {', '.join(missing)}.")
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
    last = next((stage for stage in reversed(LADDER) if any(one.method == stage for one in run.metrics)), "")
    before = LADDER[LADDER.index(row.method) - 1] if row.method in LADDER[1:] else ""
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
