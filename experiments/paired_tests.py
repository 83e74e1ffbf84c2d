"""Paired tests of a committed result, in the direction that a question asks for, and their verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.answers import label
from experiments.sources import MORE_ROWS, Source
from proper.evaluation.comparisons import CONTROLS, FORMS
from proper.evaluation.statistics import holm
from proper.reports.formats import METRICS, NO_BREAK, p_text, plain, signed
from proper.run_folder import STEPS

LEVEL = 0.05
Pair = tuple[str, str]


@dataclass(frozen=True)
class Test:
    """A tested difference between two methods."""

    source: str
    method: str
    against: str
    metric: str
    difference: float
    relative: float
    low: float
    high: float
    p: float
    resolvable: float
    higher: bool

    @property
    def verdict(self) -> str:
        """The verdict of the test."""
        if self.p < LEVEL:
            return "better" if (self.difference > 0) == self.higher else "worse"
        return "not resolvable here" if abs(self.difference) < self.resolvable else "no difference shown"

    def sentence(self) -> str:
        """Return the test as one sentence."""
        numbers = f"{signed(self.difference)} {METRICS[self.metric]} [{signed(self.low)}, {signed(self.high)}]"
        change = f"{signed(100 * self.relative, 1)} % relative, " if math.isfinite(self.relative) else ""
        change += p_of(self.p)
        verb = f"is {self.verdict} than" if self.verdict in ("better", "worse") else "against"
        rest = "" if self.verdict in ("better", "worse") else f": {self.verdict}"
        rest += f" (minimal detectable: {plain(self.resolvable)})" if self.verdict == "not resolvable here" else ""
        return f"{self.source}: {label(self.method)} {verb} {label(self.against)}: {numbers}, {change}{rest}."


def tests_of(source: Source, part: Mapping[str, Any], metric: str | None = None) -> list[Test]:
    """Return tests by a metric, else the main one, turned as the pairs say, Holm-adjusted among themselves."""
    by = metric or main_metric(part)
    rows = {(row["method"], row["against"]): row for row in part["comparisons"] if row["metric"] == by}
    found = []
    for method, against in source.pairs:
        row, sign = rows.get((method, against)), 1
        if row is None:
            row, sign = rows.get((against, method)), -1
        if row is not None:
            found.append((method, against, row, sign, _relative(part, row, against)))
    p_values = {(method, against): row["p_value"] for method, against, row, _, _ in found}
    adjusted = [_adjusted(p_values)[pair] for pair in p_values]
    tests = []
    for (method, against, row, sign, relative), p in zip(found, adjusted, strict=True):
        low, high = sorted(sign * edge for edge in row["ci95"])
        difference, resolvable, higher = sign * row["difference"], row["resolvable"], row["higher_is_better"]
        tests.append(Test(source.name, method, against, by, difference, relative, low, high, p, resolvable, higher))
    return tests


def _adjusted(p_values: Mapping[Pair, float]) -> dict[Pair, float]:
    """Return Holm's p within each family: steps between stages, controls, other forms of Users, everything else."""
    found: dict[Pair, float] = {}
    rest = [pair for pair in p_values if pair not in (*STEPS, *CONTROLS)]
    # A further form must not make what is said of Users itself less certain.
    forms = [pair for pair in rest if pair[0] in (*FORMS, MORE_ROWS)]
    for family in (STEPS, CONTROLS, forms, [pair for pair in rest if pair not in forms]):
        members = [pair for pair in p_values if pair in family]
        found |= dict(zip(members, holm([p_values[pair] for pair in members]), strict=True))
    return found


def _relative(part: Mapping[str, Any], row: Mapping[str, Any], against: str) -> float:
    """Return the change in terms of what it is compared with; better is positive, and against 0 it is NaN."""
    values = {one["method"]: one["value"] for one in part["metrics"] if one["metric"] == row["metric"]}
    other = row["method"] if against == row["against"] else row["against"]
    if not values[against]:
        return math.nan
    change = (values[other] - values[against]) / abs(values[against])
    return float(change if row["higher_is_better"] else -change)


def main_metric(part: Mapping[str, Any]) -> str:
    """Return the main metric; a slice has only that."""
    main = next((row["metric"] for row in part["metrics"] if row.get("primary")), None)
    return str(main or part["metrics"][0]["metric"])


def main_rows(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of the main metric, one for each method."""
    return [row for row in part["metrics"] if row["metric"] == main_metric(part)]


def is_higher_better(part: Mapping[str, Any]) -> bool:
    """Return whether a higher value of the main metric is better."""
    return main_metric(part) not in ("mae", "rmse", "loss")


def p_of(value: float) -> str:
    """Return a p-value as text, with breaking spaces."""
    return p_text(value).replace(NO_BREAK, " ")
