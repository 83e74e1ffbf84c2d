"""Tables of a run's report as plain cells: metrics, comparisons, slices, cost, gains, truth and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from proper.errors import RunFolderError
from proper.reports.formats import (
    NO_BREAK,
    duration,
    mean_text,
    method_name,
    metric_name,
    of_task,
    p_text,
    percent,
    plain,
    plural,
    signed,
    size,
    span,
)
from proper.reports.group_summary import group_summary
from proper.reports.load import ReportedMetric, RunFiles, UserGain
from proper.reports.narrative import gain_of, is_higher_better, primary_metrics, verdict
from proper.reports.reading import count, interval, mapping, number
from proper.run_folder import STAGE_METHODS

COUNTS = ("users", "queries", "seeds")
ONE = ("user", "query", "seed")


@dataclass(frozen=True, slots=True)
class Table:
    """A head and rows of text; `text` are the indices of non-numeric columns, `note` is a remark on the table."""

    head: list[str]
    rows: list[list[str]]
    text: frozenset[int] = field(default_factory=lambda: frozenset({0}))
    note: str = ""


def metrics(run: RunFiles) -> Table | None:
    """Return every method's score, the main metric first, with a bar of its interval."""
    several = len({row.task for row in run.metrics}) > 1
    groups: dict[tuple[str, str], list[ReportedMetric]] = {}
    for row in sorted(run.metrics, key=lambda row: not row.primary):
        groups.setdefault((row.task, row.metric), []).append(row)
    lines = []
    for (task, name), rows in groups.items():
        rows.sort(key=lambda row: _stage_order(row.method))
        arrow = "↑" if rows[0].higher_is_better else "↓"
        title = f"{f'{task}: ' if several else ''}{metric_name(name)} {arrow}"
        for index, row in enumerate(rows):
            cells = [plain(row.value), span(row.interval), _interval_bar(row, rows), plain(row.value_users)]
            lines.append(["" if index else title, method_name(row.method), *cells, *_counts(row)])
    head = ["metric", "method", "over queries", "95 % interval", "", "mean of users", *COUNTS]
    note = "↑ higher is better, ↓ lower is better. The bars of one metric share one range."
    known = {row.metric for row in run.metrics}
    note += " Answer loss is in nats per token." if "loss" in known else ""
    note += " Label loss is in nats per query, over the labels alone." if "label_loss" in known else ""
    alike = {tuple(line[-3:]) for line in lines}
    if len(alike) == 1:
        head, lines = head[:-3], [line[:-3] for line in lines]
        counted = zip(alike.pop(), ONE, COUNTS, strict=True)
        amounts = [f"{n} {one if n == '1' else many}" for n, one, many in counted]
        note += f" All over {', '.join(amounts)}."
    return Table(head, lines, frozenset({0, 1, 4}), note) if lines else None


def _interval_bar(row: ReportedMetric, rows: Sequence[ReportedMetric]) -> Markup:
    """Return one method's value and interval as a bar in a table cell, on the common range of `rows` (same metric)."""
    edges = [edge for one in rows for edge in (one.value, *(one.interval or ()))]
    low, reach = min(edges), max(edges) - min(edges)

    def at(value: float) -> float:
        return 100 * (value - low) / reach if reach else 50.0

    kind = "dot base" if row.method == "base" else "dot"
    left, right = row.interval or (row.value, row.value)
    label = f"{plain(row.value)} {span(row.interval)}"
    return Markup(
        '<span class="mini" role="img" aria-label="{}" data-tip="{}">'
        '<i style="left:{:.2f}%;width:{:.2f}%"></i><i class="{}" style="left:{:.2f}%"></i></span>'
    ).format(label, label, at(left), at(right) - at(left), kind, at(row.value))


def _counts(row: ReportedMetric) -> list[str]:
    return [_whole(row.users), _whole(row.queries), _whole(row.seeds)]


def comparisons(run: RunFiles) -> Table | None:
    """Return every paired comparison with its verdict at p < .05, adjusted if its family was."""
    lines = []
    several = len({row.task for row in run.comparisons}) > 1
    for row in sorted(run.comparisons, key=lambda row: not row.primary):
        result = verdict(row, is_higher_better(run, row.metric))
        step = of_task(row.task if several else "", f"{method_name(row.method)} − {method_name(row.against)}")
        values = [signed(row.difference), span(row.interval, sign=True), percent(row.relative, sign=True)]
        tests = [_p_cell(row.p_value), _p_cell(row.p_adjusted)]
        lines.append([step, metric_name(row.metric), *values, *tests, result])
    tests_named = sorted({row.test for row in run.comparisons if row.test})
    note = "Relative change is positive where the first method is better, also for errors."
    note += f" Test: {', '.join(tests_named)}." if tests_named else ""
    head = ["comparison", "metric", "difference", "95 % interval", "relative", "p", "p adjusted", "verdict"]
    return Table(head, lines, frozenset({0, 1, 7}), note) if lines else None


def _p_cell(p: float | None) -> str:
    return "–" if p is None else p_text(p).removeprefix(f"p{NO_BREAK}").removeprefix(f"={NO_BREAK}")


def slices(run: RunFiles) -> Table | None:
    """Return the main metric on slices of users, such as those with short histories, one column per method."""
    rows = [row for row in run.rows("slices") if number(row.get("value")) is not None]
    wanted = {row.metric for row in primary_metrics(run)} & {row.get("metric") for row in rows}
    rows = [row for row in rows if row.get("metric") in wanted or not wanted]
    methods = list(dict.fromkeys(str(row.get("method")) for row in rows))
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault(str(row.get("slice")), {})[str(row.get("method"))] = row
    lines = []
    for name, by_method in parts.items():
        first = next(iter(by_method.values()))
        lengths = interval(first.get("history"))
        reach = f"{lengths[0]:.0f} to {lengths[1]:.0f}" if lengths else "–"
        values = [_value_and_interval(by_method.get(method, {})) for method in methods]
        lines.append([name, reach, _whole(count(first.get("users"))), *values])
    head = ["slice", "history, items", "users", *map(method_name, methods)]
    note = f"Values are {', '.join(metric_name(str(name)) for name in sorted(map(str, wanted)))}, with 95 % intervals."
    return Table(head, lines, frozenset({0}), note if wanted else "") if lines else None


def _value_and_interval(row: dict[str, Any]) -> str:
    return f"{plain(number(row.get('value')))} {span(interval(row.get('ci95')))}".removesuffix(" –")


def cost(run: RunFiles) -> Table | None:
    """Return the cost per user of each method."""
    lines = [
        [
            method_name(str(row.get("method"))),
            _whole(count(row.get("parameters_per_user"))),
            size(number(row.get("bytes_per_user"))),
            duration(number(row.get("train_seconds_per_user"))),
            plain(number(row.get("tokens_per_second")), 0),
        ]
        for row in run.rows("cost")
    ]
    head = ["method", "parameters per user", "bytes per user", "training time per user", "tokens/s"]
    return Table(head, lines) if lines else None


def who_gained(gains: Sequence[UserGain], step: str) -> Table | None:
    """Return the number of users who gained by `step`, by thirds of history length and by tier."""
    known = [user for user in gains if gain_of(user, step) is not None]
    if not known:
        return None
    lines = []
    if len({user.history for user in known}) > 2 and len(known) >= 6:
        ordered = sorted(known, key=lambda user: (user.history, user.user))
        for name, part in zip(("shortest", "middle", "longest"), np.array_split(np.arange(len(known)), 3), strict=True):
            users = [ordered[index] for index in part]
            title = f"{name} histories ({users[0].history:,} to {users[-1].history:,} items)"
            lines.append(_gain_row(title, users, step))
    for tier in sorted({user.tier for user in known}):
        lines.append(_gain_row(f"served by tier: {tier}", [user for user in known if user.tier == tier], step))
    return Table(["users", "number", "gain", "no change", "loss", "mean gain"], lines)


def _gain_row(title: str, users: Sequence[UserGain], step: str) -> list[str]:
    values = [gain for user in users if (gain := gain_of(user, step)) is not None]
    up, down = sum(value > 0 for value in values), sum(value < 0 for value in values)
    return [title, *(_whole(n) for n in (len(values), up, len(values) - up - down, down)), mean_text(values)]


def task_experts(run: RunFiles) -> Table | None:
    """Return which experts serve which task; None for a run of one task."""
    shares = mapping(run.part("routing").get("tasks"))
    lines = [
        [name, *(plain(number(share), 2) for share in own)] for name, own in shares.items() if isinstance(own, list)
    ]
    if not lines:
        return None
    head = ["task", *(f"expert {at}" for at in range(len(lines[0]) - 1))]
    return Table(head, lines, frozenset({0}), "Mean gate of each expert on the histories of the task.")


def groups(run: RunFiles) -> Table | None:
    """Return the summary of each group, as in `proper groups show`; None without routing or data."""
    try:
        found = group_summary(run.folder)
    except RunFolderError:
        return None
    lines = []
    for each in found:
        typical = ", ".join(f"{row['user']} ({row['gate']:.2f})" for row in each["typical"])
        words, labels = (", ".join(str(row["text"]) for row in each[name]) or "–" for name in ("words", "labels"))
        lines.append([str(each["group"]), percent(each["utilization"], 0), str(each["users"]), typical, labels, words])
    head = ["group", "mean gate", "users", "typical users (gate)", "overrepresented labels", "overrepresented words"]
    note = (
        "Users: those whose largest mean gate it is. Labels and words: log-odds against other users' items, z ≥ 1.96."
    )
    return Table(head, lines, frozenset({3, 4, 5}), note)


def _stage_order(method: str) -> int:
    """Return the sort key that puts the stages first, in their order."""
    return STAGE_METHODS.index(method) if method in STAGE_METHODS else len(STAGE_METHODS)


def truth(values: dict[str, Any]) -> Table | None:
    """Return each method's oracle value under the planted truth beside its measured value."""
    allowed, measured = mapping(values.get("allowed")), mapping(values.get("measured"))
    names = list(dict.fromkeys([*allowed, *measured]))
    names.sort(key=_stage_order)
    lines = [[method_name(name), plain(number(allowed.get(name))), plain(number(measured.get(name)))] for name in names]
    return Table(["method", "oracle", "measured"], lines) if lines else None


def sizes(run: RunFiles) -> dict[str, dict[str, Any]]:
    """Return the kind and the size of each task by name; under "" those of a run of one task."""
    return {name: dict(row) if name else run.part("task") for name, row in run.tasks.items()}


def metadata(run: RunFiles) -> list[tuple[str, str]]:
    """Return the run's metadata: backbone, data, versions, device, time."""
    about = run.part("run")
    seconds, versions = (mapping(about.get(part)) for part in ("seconds", "versions"))
    seeds = about.get("seeds")
    of_tasks = {
        of_task(name, title): value for name, task in sizes(run).items() for title, value in _size(task).items()
    }
    rows = {
        "backbone": about.get("backbone"),
        **of_tasks,
        "seeds": ", ".join(map(str, seeds)) if isinstance(seeds, list) else seeds,
        "privacy": _privacy(mapping(about.get("privacy"))),
        "device": about.get("device"),
        "time": ", ".join(f"{name} {duration(number(value))}" for name, value in seconds.items()),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "data sha256": about.get("data_sha256"),
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "", "–")]


def _size(task: dict[str, Any]) -> dict[str, Any]:
    history = mapping(task.get("history"))
    lengths = [plain(number(history.get(name)), 0) for name in ("min", "median", "max")]
    return {
        "task": task.get("kind"),
        "target users": _whole(count(task.get("target_users"))),
        "queries": _whole(count(task.get("queries"))),
        "history, items": f"{lengths[0]} to {lengths[2]}, median {lengths[1]}" if history else None,
    }


def _privacy(values: dict[str, Any]) -> str:
    """Return the rows on differentially private training; empty without it."""
    if not values:
        return ""
    epsilon, delta = number(values.get("epsilon")), number(values.get("delta"))
    return f"epsilon {plain(epsilon)} at delta {delta:g} for a user, over stages 1 and 2" if delta is not None else ""


def tiers(values: dict[str, Any]) -> tuple[list[tuple[str, int, float]], list[str]]:
    """Return (tier, users, share of users), starting with users' own adapters, and the reasons as sentences."""
    amounts = [(name, amount) for name in reversed(STAGE_METHODS[1:]) if (amount := count(values.get(name)))]
    whole = sum(amount for _, amount in amounts)
    reasons = []
    for name, reported in mapping(values.get("reasons")).items():
        inner = reported.items() if isinstance(reported, dict) else [(None, reported)]
        for what, amount in inner:
            title = f"{name}: {what}" if what is not None else str(name)
            known = count(amount)
            reasons.append(f"{title} – {plural(known, 'user')}" if known is not None else f"{title} – {amount}")
    return [(name, amount, amount / whole) for name, amount in amounts], reasons


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
