"""Report page of one user: serving tier and its reason, gains, nearest users, and all answers.

Gathers sentences, tables and figures for the template. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proper.files import write_text
from proper.reports.formats import method_name, metric_name, plain, plural, signed, size
from proper.reports.load import RunFiles, load_run
from proper.reports.names import safe_name
from proper.reports.narrative import gain_of, is_higher_better
from proper.reports.page import render
from proper.reports.reading import number
from proper.reports.tables import Table
from proper.reports.user_data import UserReport, facts_of, known_items, load_person
from proper.reports.user_figures import gates, place, standing
from proper.run_folder import LADDER, RunFolder, Stage, Tier

MOST_QUERIES = 200
SERVED: dict[str, str] = {
    Tier.USERS: "an adapter of their own, on top of the group model",
    Tier.GROUPS: "the group model with their own embedding",
    Tier.NONE: "the group model with everybody's mean embedding",
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
    pages = [render("user.html.j2", gather(run, load_person(run, user))) for user in names]
    paths = [RunFolder(folder).user_report(safe_name(user)) for user in names]
    for path, page in zip(paths, pages, strict=True):
        write_text(path, page)
    return paths


def gather(run: RunFiles, person: UserReport) -> dict[str, Any]:
    """Return the template's values, section by section."""
    gain, routed, stored = person.gain, person.routed, person.stored
    near = [neighbour.user for neighbour in stored.neighbours]
    return {
        "user": person.user,
        "run": str(run.part("task").get("name") or run.folder.name),
        "summary": _summary(run, person),
        "tiles": _tiles(person),
        "served": _served(person),
        "losses": _losses(run, person),
        "standing": standing(gain, run.gains, run.gain_metric) if gain else None,
        "scores": _scores(run, person),
        "gates": gates(routed, run.routed) if routed else None,
        "neighbours": _neighbours(run, person),
        "place": place(routed, run.routed, near) if routed else None,
        "examples": person.examples[:MOST_QUERIES],
        "all_queries": len(person.examples),
        "versions": _versions(person),
        "problem": person.stored.problem,
    }


def _tier(person: UserReport) -> str:
    if person.stored.versions:
        return person.stored.versions[0].tier
    return person.gain.tier if person.gain else Tier.NONE


def _summary(run: RunFiles, person: UserReport) -> str:
    if person.gain is None:
        return "No target user: nothing was asked on their behalf."
    metric = metric_name(run.gain_metric)
    parts = []
    for step, above in (("groups", "the group model"), ("users", "their adapter")):
        gain = gain_of(person.gain, step)
        if gain is not None:
            what = "gained" if gain > 0 else "lost" if gain < 0 else "changed nothing"
            parts.append(f"{above} {what}{f' {plain(abs(gain))}' if gain else ''}")
    text = " and ".join(parts)
    return f"{text[0].upper()}{text[1:]} in {metric}." if parts else "The stages to compare were not scored."


def _tiles(person: UserReport) -> list[tuple[str, str]]:
    items, versions = known_items(person), person.stored.versions
    found = [
        ("history, items", None if items is None else f"{items:,}"),
        ("queries", None if person.queries is None else f"{person.queries:,}"),
        ("tier", method_name(_tier(person))),
        ("kept on disk", size(versions[0].bytes) if versions else None),
        ("version", str(versions[0].version) if versions else None),
    ]
    return [(name, value) for name, value in found if value is not None]


def _served(person: UserReport) -> list[str]:
    """Return sentences on the user's serving tier, its reason, and the training of the adapter."""
    facts, tier = facts_of(person), _tier(person)
    story = [f"Served with {SERVED.get(tier, tier)}."]
    if not person.stored.versions:
        story = [f"What the store says is not available: {person.stored.problem}."]
    if facts.get("reason"):
        pooled = ", decided with the nearest users, as the history is short" if facts.get("pooled") else ""
        story.append(f"Why: {facts['reason']}{pooled}.")
    items, passes = number(facts.get("items")), number(facts.get("passes"))
    if items is not None and person.history is not None and items < person.history:
        story.append(f"Stage 3 used the newest {items:.0f} of {person.history:,} items.")
    if passes is not None and tier == "users":
        story.append(f"The adapter saw its items {plural(int(passes), 'time')}.")
    return story


def _losses(run: RunFiles, person: UserReport) -> Table | None:
    """Return the user's losses, held-out part of the history first, beside the mean over all users."""
    facts, means = facts_of(person), person.stored.means or {}
    kept = (("group_loss", "held-out history, group model"), ("user_loss", "held-out history, with the adapter"))
    lines = [[name, plain(number(facts[key])), plain(means.get(key))] for key, name in kept if key in facts]
    trials = facts.get("held_losses")
    if isinstance(trials, list) and trials:
        passes = ", ".join(plain(number(value)) for value in trials)
        lines.append(["held-out history after each pass", passes, ""])
    if person.history_loss is not None:
        lines.append(["newest items of the history, trained on", *map(plain, person.history_loss)])
    everybody = {row.method: row.value_users for row in run.metrics if row.metric == "loss"}
    for stage in LADDER:
        if stage in person.losses:
            lines.append(
                [f"queries, {method_name(stage).lower()}", plain(person.losses[stage]), plain(everybody.get(stage))]
            )
    note = "In nats per answer token; lower is better. On queries: this user in the first seed, everybody over seeds."
    return Table(["answer loss", "this user", "mean of users"], lines, frozenset({0}), note) if lines else None


def _scores(run: RunFiles, person: UserReport) -> Table | None:
    """Return every method's score on this user's queries, beside the mean over all users."""
    if not person.scores:
        return None
    rows = {row.method: row for row in run.metrics if row.metric == run.gain_metric}
    lines = []
    for method, value in person.scores.items():
        usual = rows[method].value_users if method in rows else None
        lines.append(
            [method_name(method), plain(value), plain(usual), signed(None if usual is None else value - usual)]
        )
    better = "higher" if is_higher_better(run, run.gain_metric) else "lower"
    note = f"{metric_name(run.gain_metric)}, {better} is better; over seeds. No interval: one user is one observation."
    return Table(["method", "this user", "mean of users", "difference"], lines, frozenset({0}), note)


def _neighbours(run: RunFiles, person: UserReport) -> Table | None:
    gains, routed = {row.user: row for row in run.gains}, {row.user: row for row in run.routed}
    lines = []
    for near in person.stored.neighbours:
        gain, route = gains.get(near.user), routed.get(near.user)
        steps = [signed(gain_of(gain, step)) if gain else "–" for step in (Stage.GROUPS, Stage.USERS)]
        history = f"{gain.history:,}" if gain else "–"
        expert = str(route.main) if route else "–"
        lines.append([near.user, plain(near.cosine), method_name(near.tier), history, expert, *steps])
    head = ["user", "cosine", "tier", "history, items", "main expert", "gain by groups", "gain by users"]
    note = f"By the cosine of user embeddings; to everybody else it is {plain(person.stored.typical)} at the median."
    return Table(head, lines, frozenset({0, 2}), note) if lines else None


def _versions(person: UserReport) -> Table | None:
    lines = []
    for each in person.stored.versions:
        written = datetime.fromtimestamp(each.written, UTC).strftime("%Y-%m-%d %H:%M UTC")
        parent = "–" if each.parent is None else str(each.parent)
        facts = [str(each.version), parent, method_name(each.tier), size(each.bytes), written, each.checksum or "–"]
        lines.append([*facts, str(each.facts.get("reason") or "")])
    head = ["version", "made from", "tier", "bytes", "written", "xxh3 of the adapter", "why"]
    note = "Newest first; the first is served. `proper users rollback` makes an earlier one current again."
    return Table(head, lines, frozenset({2, 4, 5, 6}), note) if lines else None
