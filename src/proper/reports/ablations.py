"""Figures of the paper's ablations: experts, embedding size, constraint and router form, as far as the run scored them.

A method belongs to a family by its name; the run's own stage is shown among its variants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from proper.reports.figures import Figure, whisker
from proper.reports.formats import method_name, metric_name, plain, signed
from proper.reports.load import ReportedMetric, RunFiles
from proper.reports.narrative import is_higher_better, outcome, primary_metrics
from proper.reports.reading import count, mapping
from proper.reports.svg import Axis, chart, linear

CONSTRAINTS = {"constraint-experts": "experts", "groups-no-constraint": "none", "released": "released preset"}
ROUTERS = {"users-residual": "residual", "users-paper": "paper", "users-no-router": "none (3a)"}
EXPERTS = re.compile(r"^groups\[groups\.experts=(\d+)\]$")
EMBEDDING = re.compile(r"^groups\[groups\.user_embedding=(\d+)\]$")


@dataclass(frozen=True, slots=True)
class Family:
    """One ablation: `own` is the run's stage, labelled `setting`; `variant` maps another method to its setting."""

    title: str
    own: str
    setting: str
    variant: Callable[[str], str | None]
    what: str


def ablations(run: RunFiles) -> list[Figure]:
    """Draw each family for which the run scored its own stage and at least one variant."""
    rows = primary_metrics(run) if run.metrics else []
    rows = [row for row in rows if row.task == rows[0].task]
    drawn = [_figure(family, rows, run) for family in _families(run)]
    return [figure for figure in drawn if figure is not None]


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


def _figure(family: Family, rows: Sequence[ReportedMetric], run: RunFiles) -> Figure | None:
    own = next((row for row in rows if row.method == family.own), None)
    named = [(setting, row) for row in rows if (setting := family.variant(row.method)) is not None]
    if own is None or not named:
        return None
    named = _in_order([(family.setting, own), *named])
    scale = linear([edge for _, row in named for edge in (row.value, *(row.interval or ()))], pad=0.16)
    spots = [(index + 0.5) * 100 / len(named) for index in range(len(named))]
    marks = [whisker(x, row, scale) for x, (_, row) in zip(spots, named, strict=True)]
    names = [(x, setting, _below(row, own, run)) for x, (setting, row) in zip(spots, named, strict=True)]
    metric, better = metric_name(own.metric), "higher" if own.higher_is_better else "lower"
    said = ", ".join(f"{setting} {plain(row.value)}" for setting, row in named)
    drawing = chart(*marks, height=200, label=f"{metric} by {family.title}: {said}", y=Axis(scale, metric), names=names)
    caption = (
        f"{len(named)} {family.what}; {better} is better, bars are 95 % intervals over users. "
        f"Below: the difference from {method_name(family.own).lower()} of this run, in brackets where the test shows "
        "none."
    )
    return Figure(family.title, drawing, caption)


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
