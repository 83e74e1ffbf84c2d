"""Report narrative: results as sentences on gains, users who gained, routing and cost.

A gain that the test does not show is reported as "no measurable gain".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np

from proper.reports.formats import (
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
from proper.reports.load import ReportedComparison, ReportedMetric, RunFiles, UserGain
from proper.reports.reading import mapping, number
from proper.run_folder import STEPS

ALPHA = 0.05

FEW_QUERIES = 30
"""Queries of a user below which the report says that one user's gain is noisy."""

MIN_CORRELATED = 10
"""Users below which no correlation of gain and history is stated."""

Outcome = Literal["gain", "loss", "none"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step between stages in words. `outcome` is gain or loss only if the test shows it."""

    task: str
    title: str
    outcome: Outcome
    change: str
    text: str


def outcome(comparison: ReportedComparison, higher_is_better: bool) -> Outcome:
    """Return a comparison's outcome by its adjusted p-value, else its p-value, else whether its interval omits 0."""
    p = comparison.p_value if comparison.p_adjusted is None else comparison.p_adjusted
    pair = comparison.interval
    clear = p < ALPHA if p is not None else pair is not None and (pair[0] > 0 or pair[1] < 0)
    if not clear or comparison.difference == 0:
        return "none"
    return "gain" if (comparison.difference > 0) == higher_is_better else "loss"


def is_higher_better(run: RunFiles, metric: str) -> bool:
    """Return whether higher is better for a metric: as its rows say, else by its name."""
    for row in run.metrics:
        if row.metric == metric:
            return row.higher_is_better
    return metric not in {"mae", "rmse", "loss", "label_loss"}


def headline(run: RunFiles) -> tuple[str, list[Step]]:
    """Return the result in one sentence, and each tested step between stages in words."""
    rows = [row for row in run.comparisons if row.primary and (row.method, row.against) in STEPS]
    rows.sort(key=lambda row: (row.task, STEPS.index((row.method, row.against))))
    steps = [_step(row, run) for row in rows]
    bad, good = _trivial(run)
    summary = _summary(rows, steps, run)
    opened = summary[0].upper() + summary[1:] if bad else summary
    return " ".join([*bad, opened, *good, *_controls(run)]), steps


def _trivial(run: RunFiles) -> tuple[list[str], list[str]]:
    """Return the comparisons with trivial rows, unfavourable and favourable: below them, a gain is no achievement."""
    found = [(task, _against_trivial(mapping(part.get("trivial")), task, run)) for task, part in run.tasks.items()]
    bad, good = ([of_task(task, both[at]) for task, both in found if both[at]] for at in (0, 1))
    return bad, good


def _against_trivial(trivial: Mapping[str, Any], task: str, run: RunFiles) -> tuple[str, str]:
    """Return what to say before the summary and after it of one task; "" is nothing."""
    if not trivial:
        return "", ""
    values = {row.method: row.value for row in primary_metrics(run) if not task or row.task == task}
    stage, own = method_name(str(trivial["stage"])), values.get(str(trivial["stage"]))

    def shown(names: Sequence[str]) -> str:
        return ", ".join(f"{method_name(name)} ({plain(values.get(name))})" for name in names)

    parts = ["Population is undertrained: no better than the best constant."] if trivial["undertrained"] else []
    if trivial["wins"]:
        parts.append(f"Better than {stage} ({plain(own)}), without a model: {shown(trivial['wins'])}.")
    elif trivial["unclear"]:
        parts.append(f"{stage} ({plain(own)}) is not measurably better than {shown(trivial['unclear'])}.")
    return (" ".join(parts), "") if parts else ("", f"{stage} is better than every answer without a model.")


def _controls(run: RunFiles) -> list[str]:
    """Return a sentence on the controls that are not beaten: a gain that they have too is not personalization."""
    found = [(task, lost_controls(mapping(part.get("personalization")))) for task, part in run.tasks.items()]
    return [of_task(task, f"No measurable gain over a control: {lost}.") for task, lost in found if lost]


def lost_controls(claim: Mapping[str, Any]) -> str:
    """Return the pairs of a stage and a control that it does not beat, as text; "" if there are none."""
    pairs = [str(pair).split(" > ") for pair in claim.get("not_beaten") or []]
    return "; ".join(" over ".join(method_name(name) for name in pair) for pair in pairs)


def _summary(rows: Sequence[ReportedComparison], steps: Sequence[Step], run: RunFiles) -> str:
    if not steps:
        return "The stages were not compared, so the report has no gains."
    trivial = [mapping(part.get("trivial")) for part in run.tasks.values()]
    helped = not any(each and (each["wins"] or each["undertrained"]) for each in trivial)
    if all(step.outcome == "gain" for step in steps) and helped:
        alone = f"{method_name(rows[0].method)} improved on the stage before."
        return "Every stage improved on the one before." if len(steps) > 1 else alone
    if all(step.outcome == "none" for step in steps):
        return "No measurable gain at any step."
    phrases = {"gain": "a measurable gain", "loss": "a measurable loss", "none": "no measurable gain"}
    several = len({row.task for row in rows}) > 1
    parts = [
        f"{f'{row.task}, ' if several else ''}{method_name(row.method).lower()}: {phrases[step.outcome]}"
        for row, step in zip(rows, steps, strict=True)
    ]
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _step(row: ReportedComparison, run: RunFiles) -> Step:
    higher = is_higher_better(run, row.metric)
    result = outcome(row, higher)
    values = {m.method: m.value for m in run.metrics if m.metric == row.metric and m.task == row.task}
    old, new = values.get(row.against), values.get(row.method)
    moved = f" from {plain(old)} to {plain(new)}" if old is not None and new is not None else ""
    verb = "unchanged" if row.difference == 0 else "rose" if row.difference > 0 else "fell"
    opening = {"gain": "", "loss": "Measurably worse: ", "none": "No measurable gain: "}[result]
    metric = metric_name(row.metric)
    change = f"{metric if opening else metric[0].upper() + metric[1:]} {verb}{moved}"
    adjusted = ", Holm-adjusted" if row.p_adjusted is not None else ""
    p = p_text(row.p_value if row.p_adjusted is None else row.p_adjusted)
    sure = f"difference {signed(row.difference)}, 95 % interval {span(row.interval, sign=True)}, {p}{adjusted}"
    better = "" if higher else " Lower is better."
    task = row.task if run.first_task else ""
    title = of_task(task, f"{method_name(row.against)} → {method_name(row.method)}")
    return Step(row.task, title, result, percent(row.relative, sign=True), f"{opening}{change} ({sure}).{better}")


def change_text(row: ReportedComparison, run: RunFiles) -> str:
    """Return a step's relative change for a figure, in brackets if the test does not show it."""
    unclear = outcome(row, is_higher_better(run, row.metric)) == "none"
    change = percent(row.relative, sign=True)
    return f"({change})" if unclear else change


def verdict_name(result: Outcome) -> str:
    """Return the verdict of a comparison for a table."""
    return {"gain": "better", "loss": "worse", "none": "not significant"}[result]


def verdict(row: ReportedComparison, higher_is_better: bool) -> str:
    """Return the verdict of a comparison, with a note if the difference is below the minimal detectable one."""
    result = outcome(row, higher_is_better)
    if result == "none" and row.resolvable is not None and abs(row.difference) < row.resolvable:
        return "not resolvable here"
    return verdict_name(result)


def primary_metrics(run: RunFiles) -> list[ReportedMetric]:
    """Return the rows of each task's main metric, in the file's order; the first metric's if none is marked."""
    marked = [row for row in run.metrics if row.primary]
    return marked or [row for row in run.metrics if row.metric == run.metrics[0].metric]


def gain_story(gains: Sequence[UserGain], step: str) -> list[str]:
    """Return sentences on which users gained by `step` ("groups" or "users"), and on correlates of the gain."""
    known = [(user, gain) for user in gains if (gain := gain_of(user, step)) is not None]
    if not known:
        return []
    up, down = [u for u, g in known if g > 0], [u for u, g in known if g < 0]
    same = len(known) - len(up) - len(down)
    story = [f"Of {plural(len(known), 'user')}, {len(up)} gained, {len(down)} lost and {same} stayed the same."]
    if up and down:
        long, short = (median(user.history for user in part) for part in (up, down))
        story.append(f"Median history: {long:g} items of those who gained, {short:g} of those who lost.")
    story += _relation([user.history for user, _ in known], [gain for _, gain in known])
    kept = [user for user, _ in known if user.tier in {"population", "groups"}]
    if step == "users" and kept:
        story.append(f"{plural(len(kept), 'user')} are served without an adapter of their own.")
    queries = [user.queries for user in gains if user.queries]
    if queries and (few := median(queries)) < FEW_QUERIES:
        story.append(f"A user has {few:g} queries at the median, so the bar of one user is noisy.")
    return story


def gain_of(user: UserGain, step: str) -> float | None:
    """Return a user's gain by one step, positive for an improvement."""
    return user.gain_groups if step == "groups" else user.gain_users


def _relation(history: Sequence[int], gains: Sequence[float]) -> list[str]:
    """Return a sentence on whether gains grow with history length: Spearman's rank correlation against 2 / sqrt(n)."""
    if len(history) < MIN_CORRELATED or len(set(history)) < 2 or len(set(gains)) < 2:
        return []
    rho = float(np.corrcoef(_ranks(history), _ranks(gains))[0, 1])
    tail = f"(rank correlation {signed(rho, 2)})."
    if abs(rho) < 2 / math.sqrt(len(history)):
        return [f"The gain does not depend measurably on history length {tail}"]
    return [f"Users with longer histories had {'larger' if rho > 0 else 'smaller'} gains {tail}"]


def _ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return ranks; ties get their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray[Any, np.dtype[np.float64]] = ((ends - counts + 1 + ends) / 2)[inverse]
    return ranks


def routing_story(figures: Mapping[str, Any]) -> list[str]:
    """Return sentences that interpret the available routing figures."""
    experts = number(figures.get("experts"))
    entropy, shared = number(figures.get("entropy")), number(figures.get("user_expert_mutual_information"))
    cosine = number(figures.get("constraint_cosine"))
    story = []
    if entropy is not None:
        most = f" of {plain(math.log(experts), 2)} nats at most" if experts and experts > 1 else " nats"
        story.append(
            f"Entropy of users' mean gates {plain(entropy, 2)}{most}; lower means that a user uses fewer experts."
        )
    if shared is not None:
        story.append(f"Mutual information of user and expert {plain(shared)} nats; 0 means equal routing of all users.")
    if cosine is not None:
        story.append(f"Mean cosine between two users' gates {plain(cosine)}; 1 means that users' gates do not differ.")
    by_task = number(figures.get("task_expert_mutual_information"))
    if by_task is not None:
        story.append(
            f"Mutual information of task and expert {plain(by_task)} nats; 0 means that tasks share all experts."
        )
    return story


def cost_story(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the disk space of a million users, if the user stage's size is known."""
    for row in rows:
        amount = number(row.get("bytes_per_user"))
        if row.get("method") == "users" and amount:
            return f"One user needs {size(amount)}; a million users would need {size(amount * 1e6)}."
    return ""


def truth_story(truth: Mapping[str, Any]) -> list[str]:
    """Return sentences on how well the routing recovers the planted groups."""
    story = []
    nmi = number(truth.get("nmi"))
    if nmi is not None:
        how = "the groups were found" if nmi >= 0.8 else "partly found" if nmi >= 0.4 else "the groups were not found"
        story.append(f"Normalized mutual information of clusters and true groups: {plain(nmi, 2)} of 1 ({how}).")
    return story
