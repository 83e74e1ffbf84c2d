"""Report page of one user: serving tier and its reason, gains, nearest users, and all answers.

Gathers sentences, tables and figures for the template. No model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proper.files import write_text
from proper.reports import charts
from proper.reports.charts import NAMES, TICKS, Canvas, Chart, canvas, color
from proper.reports.figures import hide_ticks
from proper.reports.formats import method_name, metric_name, of_task, plain, plural, safe_name, signed, size
from proper.reports.html import render
from proper.reports.load import ReportedMetric, RoutedUser, RunFiles, UserGain, load_run
from proper.reports.narrative import gain_of, is_higher_better
from proper.reports.reading import number
from proper.reports.tables import Table
from proper.reports.user_data import UserReport, known_items, load_user, metadata_of
from proper.run_folder import STAGE_METHODS, RunFolder, Stage, Tier

STEPS = (("groups", "population"), ("users", "groups"))
MAX_QUERIES = 200
MAX_DOTS = 800
SERVED: dict[str, str] = {
    Tier.USERS: "the user's adapter, on top of the group model",
    Tier.GROUPS: "the group model with the user's embedding",
    Tier.NONE: "the group model with the mean embedding of all users",
}


def write_user_pages(folder: Path, users: Sequence[str]) -> list[Path]:
    """Write `report-user-NAME.html` into the run folder for each user, all or none, and return the paths.

    Raises:
        InputError: a user is not in the run; the message names the nearest id.
        RunFolderError: results.json is missing, or a file is not readable.
        StoreError: the store is damaged.
    """
    run = load_run(folder)
    names = list(dict.fromkeys(users))
    pages = [render("user.html.j2", gather(run, load_user(run, user))) for user in names]
    paths = [RunFolder(folder).user_report(safe_name(user)) for user in names]
    for path, page in zip(paths, pages, strict=True):
        write_text(path, page)
    return paths


def gather(run: RunFiles, report: UserReport) -> dict[str, Any]:
    """Return the template's values, section by section."""
    gain, routed, stored = report.gain, report.routed, report.stored
    near = [neighbour.user for neighbour in stored.neighbours]
    return {
        "user": report.user,
        "run": str(run.part("task").get("name") or run.folder.name),
        "summary": _summary(run, report),
        "tiles": _tiles(report),
        "served": _served(report),
        "losses": _losses(run, report),
        "standing": standing(gain, run.gains, run.gain_metric) if gain else None,
        "scores": _scores(run, report),
        "gates": gates(routed, run.routed) if routed else None,
        "neighbours": _neighbours(run, report),
        "position": position_map(routed, run.routed, near) if routed else None,
        "examples": report.examples[:MAX_QUERIES],
        "all_queries": len(report.examples),
        "versions": _versions(report),
        "problem": report.stored.problem,
    }


def _tier(report: UserReport) -> str:
    if report.stored.versions:
        return report.stored.versions[0].tier
    return report.gain.tier if report.gain else Tier.NONE


def _summary(run: RunFiles, report: UserReport) -> str:
    if report.gain is None and report.examples:
        return f"The task {run.first_task} has no queries of this user."
    if report.gain is None:
        return "Not a target user: the run has no queries of this user."
    names = ((Stage.GROUPS, "group model"), (Stage.USERS, "user adapter"))
    gains = [(name, gain) for step, name in names if (gain := gain_of(report.gain, step)) is not None]
    if not gains:
        return "The stages to compare were not scored."
    steps = ", ".join(f"{name} {signed(gain)}" for name, gain in gains)
    return of_task(run.first_task, f"Gain in {metric_name(run.gain_metric)} on this user's queries: {steps}.")


def _tiles(report: UserReport) -> list[tuple[str, str]]:
    items, versions = known_items(report), report.stored.versions
    found = [
        ("history, items", None if items is None else f"{items:,}"),
        ("queries", None if report.queries is None else f"{report.queries:,}"),
        ("tier", method_name(_tier(report))),
        ("bytes on disk", size(versions[0].bytes) if versions else None),
        ("version", str(versions[0].version) if versions else None),
    ]
    return [(name, value) for name, value in found if value is not None]


def _served(report: UserReport) -> list[str]:
    """Return sentences on the user's serving tier, its reason, and the training of the adapter."""
    metadata, tier = metadata_of(report), _tier(report)
    story = [f"Served by {SERVED.get(tier, tier)}."]
    if not report.stored.versions:
        story = [f"Store metadata is not available: {report.stored.problem}."]
    if metadata.get("reason"):
        pooled = ", decided together with the nearest users, because one history is short"
        pooled = pooled if metadata.get("pooled") and "similar users" not in str(metadata["reason"]) else ""
        story.append(f"Reason: {metadata['reason']}{pooled}.")
    items, passes = number(metadata.get("items")), number(metadata.get("passes"))
    own = "history" not in metadata  # which a version has that was enrolled or updated since
    if own and items is not None and report.rows is not None and items < report.rows:
        story.append(f"Stage 3 used the newest {items:.0f} of {report.rows:,} items.")
    if passes is not None and tier == "users":
        story.append(f"The adapter was trained for {plural(int(passes), 'epoch')}.")
    return story


def _losses(run: RunFiles, report: UserReport) -> Table | None:
    """Return the user's losses, held-out part of the history first, beside the mean over all users."""
    metadata, means = metadata_of(report), report.stored.means or {}
    kept = (("group_loss", "held-out history, group model"), ("user_loss", "held-out history, with the adapter"))
    lines = [[name, plain(number(metadata[key])), plain(means.get(key))] for key, name in kept if key in metadata]
    trials = metadata.get("held_losses")
    if isinstance(trials, list) and trials:
        passes = ", ".join(plain(number(value)) for value in trials)
        lines.append(["held-out history after each pass", passes, ""])
    if report.history_loss is not None:
        lines.append(["newest items of the history, trained on", *map(plain, report.history_loss)])
    all_users = {row.method: row.value_users for row in _of_first_task(run) if row.metric == "loss"}
    for stage in STAGE_METHODS:
        if stage in report.losses:
            lines.append(
                [f"queries, {method_name(stage).lower()}", plain(report.losses[stage]), plain(all_users.get(stage))]
            )
    note = "In nats per answer token; lower is better. On queries: this user in the first seed, all users over seeds."
    head = [of_task(run.first_task, "answer loss"), "this user", "mean of users"]
    return Table(head, lines, frozenset({0}), note) if lines else None


def _of_first_task(run: RunFiles) -> list[ReportedMetric]:
    """Return the metrics of the task that the user's own scores and losses are of."""
    return [row for row in run.metrics if not run.first_task or row.task == run.first_task]


def _scores(run: RunFiles, report: UserReport) -> Table | None:
    """Return every method's score on this user's queries, beside the mean over all users."""
    if not report.scores:
        return None
    rows = {row.method: row for row in _of_first_task(run) if row.metric == run.gain_metric}
    lines = []
    for method, value in report.scores.items():
        usual = rows[method].value_users if method in rows else None
        lines.append(
            [method_name(method), plain(value), plain(usual), signed(None if usual is None else value - usual)]
        )
    better = "higher" if is_higher_better(run, run.gain_metric) else "lower"
    note = f"{metric_name(run.gain_metric)}, {better} is better; over seeds. No interval: one user is one observation."
    note = of_task(run.first_task, note)
    return Table(["method", "this user", "mean of users", "difference"], lines, frozenset({0}), note)


def _neighbours(run: RunFiles, report: UserReport) -> Table | None:
    gains, routed = {row.user: row for row in run.gains}, {row.user: row for row in run.routed}
    lines = []
    for near in report.stored.neighbours:
        gain, route = gains.get(near.user), routed.get(near.user)
        steps = [signed(gain_of(gain, step)) if gain else "–" for step in (Stage.GROUPS, Stage.USERS)]
        history = f"{gain.history:,}" if gain else "–"
        expert = str(route.main) if route else "–"
        lines.append([near.user, plain(near.cosine), method_name(near.tier), history, expert, *steps])
    head = ["user", "cosine", "tier", "history, items", "main expert", "gain by groups", "gain by users"]
    note = f"By the cosine of user embeddings; to all other users it is {plain(report.stored.typical)} at the median."
    return Table(head, lines, frozenset({0, 2}), note) if lines else None


def _versions(report: UserReport) -> Table | None:
    lines = []
    for each in report.stored.versions:
        written = datetime.fromtimestamp(each.written, UTC).strftime("%Y-%m-%d %H:%M UTC")
        parent = "–" if each.parent is None else str(each.parent)
        cells = [str(each.version), parent, method_name(each.tier), size(each.bytes), written, each.checksum or "–"]
        lines.append([*cells, str(each.metadata.get("reason") or "")])
    head = ["version", "parent", "tier", "bytes", "written", "xxh3 of the adapter", "reason"]
    note = "Newest first; the first is served. `proper users rollback` serves an earlier version again."
    return Table(head, lines, frozenset({2, 4, 5, 6}), note) if lines else None


def standing(own: UserGain, all_users: Sequence[UserGain], metric: str) -> Chart | None:
    """Draw this user's gain by each step among the gains of all users."""
    steps = [(step, below) for step, below in STEPS if gain_of(own, step) is not None]
    if not steps:
        return None
    label = f"Gain in {metric_name(metric)} of {own.user} among {len(all_users)} users"
    with canvas(label, 560, *[(44, TICKS)] * len(steps), left=8, top=8) as drawing:
        for panel, (step, below) in enumerate(steps):
            _strip(drawing, panel, own, [user for user in all_users if gain_of(user, step) is not None], step)
            title = f"gain in {metric_name(metric)}, {method_name(step).lower()} over {below}"
            charts.titles(drawing.panels[panel], across=title)
    caption = "One faint dot per user, this user in colour; a gain is right of the line. "
    caption += " ".join(_rank(own, all_users, step) for step, _ in steps)
    if own.queries:
        caption += f" {own.queries} queries of one user are few: read it as a hint."
    return Chart("Gain at each step, among all users", drawing.svg, caption)


def _strip(drawing: Canvas, panel: int, own: UserGain, users: Sequence[UserGain], step: str) -> None:
    axes = drawing.panels[panel]
    shown = users[:: max(1, -(-len(users) // MAX_DOTS))]
    values = [gain_of(user, step) or 0.0 for user in shown]
    dots = axes.scatter(
        values, [_height(user.user) for user in shown], s=38, color=color("same"), alpha=0.4, linewidth=0
    )
    drawing.tips(
        dots, [f"user {user.user}\ngain {signed(gain)}" for user, gain in zip(shown, values, strict=True)], "dot"
    )
    gain = gain_of(own, step) or 0.0
    hue = 0 if gain >= 0 else 1
    mark = axes.scatter([gain], [0.5], s=150, marker=charts.marker(hue), color=color(hue), edgecolor=color("card"))
    drawing.tips(mark, [f"{own.user}\ngain {signed(gain)}"], "mark")
    axes.set(ylim=(0, 1), yticks=[])
    axes.axvline(0, color=color("same"), linewidth=1, zorder=0)
    charts.value_axis(axes, pad=0.04, across=True)


def _height(user: str) -> float:
    """Return a height in 0.15 .. 0.85 that depends only on the user id, so that equal gains do not cover each other."""
    return 0.15 + hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] / 255 * 0.7


def _rank(own: UserGain, all_users: Sequence[UserGain], step: str) -> str:
    gain = gain_of(own, step)
    values = [value for user in all_users if (value := gain_of(user, step)) is not None]
    under = sum(value < gain for value in values if gain is not None)
    return f"{method_name(step)}: {signed(gain)}, more than {under} of {len(values)} users."


def gates(own: RoutedUser, all_users: Sequence[RoutedUser]) -> Chart:
    """Draw this user's mean gates as bars, with the mean over all users."""
    mean = mean_gates(all_users)
    usual = mean[: len(own.gates)]
    experts = range(len(own.gates))
    tips = [f"expert {at}\nthis user {plain(own.gates[at])}\nall users {plain(usual[at])}" for at in experts]
    differences = [gate - each for gate, each in zip(own.gates, usual, strict=True)]
    label = f"Mean gates over {len(own.gates)} experts, of this user and of all users"
    with canvas(label, 480, (170, NAMES)) as drawing:
        axes = drawing.axes
        drawing.tips(
            axes.vlines(experts, 0, own.gates, colors=color("accent"), linewidth=213 / len(usual)), tips, "bar"
        )
        axes.hlines(
            usual, [at - 0.38 for at in experts], [at + 0.38 for at in experts], colors=color("ink"), linewidth=2.5
        )
        charts.names(axes, [(str(at), signed(each, 2)) for at, each in enumerate(differences)])
        charts.value_axis(axes, pad=0.06)
        charts.titles(axes, "mean gate by expert")
    most = max(experts, key=lambda at: abs(differences[at]))
    caption = f"Bars: this user. Dark lines: the mean of {len(all_users)} target users; below: the difference. "
    caption += f"Expert {most} differs most ({signed(differences[most], 2)}); the user's main expert is {own.main}."
    return Chart("Mean gates of this user and of all users", drawing.svg, caption)


def mean_gates(all_users: Sequence[RoutedUser]) -> list[float]:
    """Return the mean gate of every expert over users, with equal weight per user."""
    experts = max(len(user.gates) for user in all_users)
    return [
        sum(user.gates[expert] if expert < len(user.gates) else 0.0 for user in all_users) / len(all_users)
        for expert in range(experts)
    ]


def position_map(own: RoutedUser, all_users: Sequence[RoutedUser], near: Sequence[str]) -> Chart | None:
    """Draw all users' embeddings in two dimensions, with this user and the nearest ones marked."""
    known = [user for user in all_users if user.position is not None]
    if own.position is None or len(known) < 3:
        return None
    nearest = [user for user in known if user.user in near]
    others = [user for user in known[:: max(1, -(-len(known) // MAX_DOTS))] if user.user not in {own.user, *near}]
    looks: list[tuple[list[RoutedUser], str, dict[str, Any]]] = [
        (others, "dot", {"s": 38, "color": color("same"), "alpha": 0.4, "linewidth": 0}),
        (nearest, "mark", {"s": 46, "color": color(2), "marker": charts.marker(2)}),
        ([own], "mark", {"s": 150, "color": color(0), "edgecolor": color("card")}),
    ]
    label = f"Map of {len(known)} user embeddings with {own.user} and the nearest"
    with canvas(label, 480, (240, 8), left=8, top=8) as drawing:
        for users, css, look in looks:
            points = [user.position or (0.0, 0.0) for user in users]
            marks = drawing.axes.scatter([x for x, _ in points], [y for _, y in points], **look)
            drawing.tips(marks, [f"user {user.user}\nmain expert {user.main}" for user in users], css)
        hide_ticks(drawing.axes)
    caption = "A projection to two dimensions: users who are near here need not be near in all dimensions."
    legend = charts.keys([(0, "this user"), (2, "nearest users")])
    return Chart("Map of user embeddings", drawing.svg + legend, caption)
