"""Paired comparisons of methods: which pairs are tested, and their p-values, Holm-adjusted by family.

The primary family is the two steps between stages (groups against population, users against groups) on the task's main
metric. The controls are a second family, the trivial rows a third, measures of style a fourth, and all other
comparisons form the family "other"; p-values are adjusted within each family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from proper.evaluation.metrics import TaskInfo, primary_metric
from proper.evaluation.statistics import Effort, UserScores, compare, holm
from proper.run_folder import STAGE_METHODS, STEPS

Scores = Mapping[tuple[str, str], UserScores]
"""Scores by (method, metric)."""

CONTROLS = (
    ("groups", "population-more"),
    ("groups", "groups-shared-e"),
    ("users", "swapped"),
    ("users", "shuffled"),
)
"""Stages against methods that lack only the information about the user.

    groups against population-more     the same rows, steps and parameters, one LoRA, no users
    groups against groups-shared-e     experts and router, one embedding shared by all users
    users  against swapped             another user's embedding and adapter
    users  against shuffled            trained on rows permuted across users

The last comparison tests "the gain with real user ids exceeds the gain with shuffled ids": both gains are over the same
population model, which cancels.
"""

ABLATIONS = (
    ("groups", "groups-no-constraint"),
    ("groups", "constraint-experts"),
    ("groups", "poly"),
    ("oppu-released", "oppu"),
    ("users+rag", "rag"),
    ("groups+prior", "groups"),
    ("users+prior", "users"),
    ("groups+residual", "groups"),
    ("users+residual", "users"),
    ("users+residual", "groups+residual"),
    ("users+residual", "users+prior"),
    ("groups+head", "groups"),
    ("users+head", "users"),
    ("users+head", "groups+head"),
    ("users+rag", "users"),
)
"""Methods that are also compared with a specific counterpart, besides the last stage."""

FORMS = ("users+prior", "users+residual", "users+head", "users+rag")
"""Further forms of stage 3, which are compared with every method that is not a stage, as the last stage is."""

CONSTANT = "global-majority"
"""The method that answers the best constant."""

LEAD = "lead"
"""The method that answers the first words of the input, where answers are text."""

TRIVIAL = (CONSTANT, "user-majority", "user-majority-same", "prior", LEAD)
"""Methods that need no model; every table has those that the task allows, requested or not."""


def default_pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (method, against) pairs that every run compares.

    These are the steps between stages, users against population, the controls, population against the best constant
    (text: against the input's first words), and the last evaluated stage against every other method.
    """
    wanted = (*STEPS, ("users", "population"), *CONTROLS, *ABLATIONS, ("population", CONSTANT), ("population", LEAD))
    pairs = [pair for pair in wanted if set(pair) <= set(methods)]
    # The backbone alone is a stage only where no other was evaluated.
    stages = [m for m in STAGE_METHODS[1:] if m in methods] or [m for m in STAGE_METHODS[:1] if m in methods]
    others = [method for method in methods if method not in stages]
    forms = [(form, other) for form in FORMS if form in methods for other in others if other != form]
    return list(dict.fromkeys(pairs + [(stages[-1], other) for other in others if stages] + forms))


def comparison_rows(
    scores: Scores, pairs: Sequence[tuple[str, str]], task: TaskInfo, effort: Effort
) -> list[dict[str, Any]]:
    """Return the `comparisons` of `results.json`: every pair on every common metric, p-values adjusted by family."""
    rows: list[dict[str, Any]] = []
    for method, against, name in _tested(scores, pairs):
        primary = name == primary_metric(task)
        found = compare(scores[method, name], scores[against, name], effort)
        rows.append(
            {
                "task": task.name,
                "method": method,
                "against": against,
                "metric": name,
                "difference": found.difference,
                "relative": found.relative,
                "ci95": [found.low, found.high],
                "p_value": found.p_value,
                "p_adjusted": math.nan,
                "family": _family(method, against) if primary else "style" if name.startswith("style_") else "other",
                "test": found.test,
                "primary": primary,
                "resolvable": found.resolvable,
                "higher_is_better": scores[method, name].metric.higher_is_better,
            }
        )
    adjust(rows)
    return rows


def adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Set `p_adjusted` of every comparison: Holm's p within its family."""
    for family in ("primary", "controls", "trivial", "style", "other"):
        members = [row for row in rows if row["family"] == family]
        for row, adjusted in zip(members, holm([row["p_value"] for row in members]), strict=True):
            row["p_adjusted"] = adjusted


def _family(method: str, against: str) -> str:
    pair = (method, against)
    if method in STAGE_METHODS and against in TRIVIAL:
        return "trivial"
    return "primary" if pair in STEPS else "controls" if pair in CONTROLS else "other"


def _tested(scores: Scores, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield (method, against, metric) for every pair and every metric that both methods have."""
    names = list(dict.fromkeys(name for _, name in scores))
    for method, against in pairs:
        for name in names:
            if (method, name) in scores and (against, name) in scores:
                yield method, against, name
