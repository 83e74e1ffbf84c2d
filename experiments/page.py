"""docs/findings.md and its figures from the committed results, and from nothing else: no number is typed in.

A sentence claims what a paired test over users shows at p < .05 after Holm's correction; a difference
below what 80 % power needs is called not resolvable here. A question whose jobs have not run says so.
Knows nothing about how results are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.answers import label
from experiments.figures import Line, Panel, Row, curves, intervals
from experiments.questions import QUESTIONS, Question, Source
from proper.evaluation.comparisons import CONTROLS, STEPS
from proper.evaluation.statistics import holm
from proper.files import read_json
from proper.reports.formats import METRICS, NO_BREAK, p_text, plain, signed

LEVEL = 0.05
LOSS = "loss"
Pair = tuple[str, str]
HEAD = """\
# The paper's questions on real data

Made by `python -m experiments page` from the files in `docs/results/`: no figure is typed in, and what is bold
follows from the tests by rule; the notes are ours. The backbone is the embedded one of 13 M parameters, so a number
says what this code does with that backbone, not what a model of 7 B would do. `recipes/findings.sh` runs whatever is
missing; `recipes/findings.sh --list` says how long that takes.

How to read it: intervals resample users (95 %), and average seeds first. p is from a permutation test paired by user,
after Holm's correction within a table's family: the steps of the ladder, the controls, the rest. "Better" and "worse"
are said only where p < .05. "Not resolvable here" is a difference that is not shown and is smaller than what these
users and queries show with 80 % power. Results are as they came: nothing was tuned on the queries. Claims are of the
main metric. The loss of the true answers (nats per token) is a second look at the same answers: it shows smaller
differences, since it sees how sure a model was, and a reader of the answers does not see it.

"""


@dataclass(frozen=True)
class Test:
    """A difference between two methods, as it is said."""

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
        """What the test shows."""
        if self.p < LEVEL:
            return "better" if (self.difference > 0) == self.higher else "worse"
        return "not resolvable here" if abs(self.difference) < self.resolvable else "no difference shown"

    def sentence(self) -> str:
        """Put it into one sentence."""
        numbers = f"{signed(self.difference)} {METRICS[self.metric]} [{signed(self.low)}, {signed(self.high)}]"
        change = f"{signed(100 * self.relative, 1)} % relative, " if math.isfinite(self.relative) else ""
        change += _p(self.p)
        told = f"is {self.verdict} than" if self.verdict in ("better", "worse") else "against"
        rest = "" if self.verdict in ("better", "worse") else f": {self.verdict}"
        rest += f" (smallest to show: {plain(self.resolvable)})" if self.verdict == "not resolvable here" else ""
        return f"{self.source}: {label(self.method)} {told} {label(self.against)}: {numbers}, {change}{rest}."


def pages(results: Path) -> dict[str, str]:
    """Return the text of every file of the page, by its path under docs/."""
    parts, files, answers = [], {}, []
    for question in QUESTIONS:
        found = [(source, part) for source in question.sources for part in _load(results, source)]
        tests = {source.name: tests_of(source, part) for source, part in found}
        answers.append(f"{question.number}. {question.title}: {question.answer(tests) if found else 'not run yet.'}")
        parts.append(_section(question, found, tests))
        if found:
            files[f"findings/q{question.number}.svg"] = _figure(question, found)
    short = "\n".join(["## In short", "", *answers, ""])
    return {"findings.md": "\n".join([HEAD, short, *parts]).rstrip() + "\n", **files}


def _load(results: Path, source: Source) -> Iterator[Mapping[str, Any]]:
    path = results / source.file
    if path.exists():
        found = read_json(path)
        for step in source.inside:
            found = found[step]
        yield found


def _section(
    question: Question, found: Sequence[tuple[Source, Mapping[str, Any]]], tests: Mapping[str, list[Test]]
) -> str:
    lines = [f"## {question.number}. {question.title}", "", question.asked, ""]
    there = {source.name for source, _ in found}
    missing = [source.name for source in question.sources if source.name not in there]
    if found:
        lines += [f"**{question.answer(tests)}**", ""]
        for source, part in found:
            lines += [*_table(source, part, tests[source.name]), "", *_truncated(part)]
            lines += [*_routing(part), *([""] if "routing_of" in part else [])]
        lines += [f"![{question.title}](findings/q{question.number}.svg)", ""]
        lines += [*_sentences(question, tests), "", *_by_loss(question, found)]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines += [f"Note: {note}" for note in question.notes] + ([""] if question.notes else [])
    lines += ["<!-- not run: takes hours -->", "```console", f"$ {question.command}", "```", ""]
    return "\n".join(lines)


def _sentences(question: Question, tests: Mapping[str, Sequence[Test]]) -> list[str]:
    said = [test for of_source in tests.values() for test in of_source if _is_key(question, test)]
    return [f"- {test.sentence()}" for test in said]


def _by_loss(question: Question, found: Sequence[tuple[Source, Mapping[str, Any]]]) -> list[str]:
    """Say the same by the loss of the true answers, where it was measured."""
    tests = {source.name: tests_of(source, part, LOSS) for source, part in found}
    tests = {name: of_source for name, of_source in tests.items() if of_source}
    if not tests:
        return []
    told = [
        "<details><summary>Each difference in loss</summary>",
        "",
        *_sentences(question, tests),
        "",
        "</details>",
        "",
    ]
    return [f"By the loss of the true answers: {question.answer(tests)}", "", *told]


def _is_key(question: Question, test: Test) -> bool:
    return not question.key or (test.method, test.against) in question.key


def tests_of(source: Source, part: Mapping[str, Any], metric: str | None = None) -> list[Test]:
    """Return tests by a metric, else the main one, turned as the pairs say, Holm-adjusted among themselves."""
    by = metric or _metric(part)
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
    """Return Holm's p within each family: the steps of the ladder, the controls, everything else."""
    found: dict[Pair, float] = {}
    for family in (STEPS, CONTROLS, [pair for pair in p_values if pair not in (*STEPS, *CONTROLS)]):
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


def _metric(part: Mapping[str, Any]) -> str:
    """Return the main metric; a slice has only that."""
    main = next((row["metric"] for row in part["metrics"] if row.get("primary")), None)
    return str(main or part["metrics"][0]["metric"])


def _rows(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in part["metrics"] if row["metric"] == _metric(part)]


def _table(source: Source, part: Mapping[str, Any], tests: Sequence[Test]) -> list[str]:
    rows = _rows(part)
    arrow = "↑" if _higher(part) else "↓"
    seeds = max(len(row.get("by_seed", [0])) for row in rows)
    size = f"{rows[0]['users']} users, {rows[0]['queries']} queries, {seeds} seed{'s' if seeds > 1 else ''}"
    lines = [f"{source.name} ({size})", ""]
    lines += [f"| method | {METRICS[_metric(part)]} {arrow} [95 %] | seeds | difference [95 %] | p | shows |"]
    lines += ["|---|---|---|---|---|---|"]
    by_method: dict[str, list[Test]] = {}
    for test in tests:
        by_method.setdefault(test.method, []).append(test)
    for row in rows:
        low, high = row["ci95"]
        values = row.get("by_seed", [])
        spread = f"{plain(min(values))} to {plain(max(values))}" if len(values) > 1 else "one"
        cells = [label(row["method"]), f"{plain(row['value'])} [{plain(low)}, {plain(high)}]", spread]
        of_method: Sequence[Test | None] = by_method.get(row["method"]) or [None]
        for at, shown in enumerate(of_method):
            lines.append("| " + " | ".join([*(cells if not at else ["", "", ""]), *_cells(shown)]) + " |")
    return lines


def _truncated(part: Mapping[str, Any]) -> list[str]:
    """Say whose prompts were longer than the backbone's context, as retrieval's are."""
    cut = {row["method"]: row["truncated_prompts"] for row in part.get("cost", []) if row.get("truncated_prompts")}
    if not cut:
        return []
    queries = _rows(part)[0]["queries"]
    if len(set(cut.values())) == 1 and len(cut) == len(_rows(part)):
        return [f"Prompts cut to the backbone's context: {next(iter(cut.values()))} of {queries}.", ""]
    told = ", ".join(f"{label(method)} {number}" for method, number in cut.items())
    return [f"Prompts cut to the backbone's context, of {queries}: {told}.", ""]


def _cells(test: Test | None) -> list[str]:
    if test is None:
        return ["", "", ""]
    change = f"{signed(test.difference)} [{signed(test.low)}, {signed(test.high)}] against {label(test.against)}"
    return [change, _p(test.p).removeprefix("p = ").removeprefix("p "), test.verdict]


def _p(value: float) -> str:
    return p_text(value).replace(NO_BREAK, " ")


def _higher(part: Mapping[str, Any]) -> bool:
    return _metric(part) not in ("mae", "rmse", "loss")


def _routing(part: Mapping[str, Any]) -> list[str]:
    if "routing_of" not in part:
        return []
    lines = [
        "| routing, seed 0 | experts' shares | entropy | user-expert information | cosine between users |",
        "|---|---|---|---|---|",
    ]
    for method, row in part["routing_of"].items():
        shares = ", ".join(plain(share, 2) for share in row["utilization"])
        numbers = [row["entropy"], row["user_expert_mutual_information"], row["constraint_cosine"]]
        lines.append(f"| {label(method)} | {shares} | " + " | ".join(plain(number) for number in numbers) + " |")
    return lines


def _figure(question: Question, found: Sequence[tuple[Source, Mapping[str, Any]]]) -> str:
    curved = [(source, part) for source, part in found if question.curve and source.items]
    if curved:
        return _curves(question, curved)
    panels = []
    for source, part in found:
        main = {against for _, against in source.pairs}
        # The bare backbone is far off, and would press all else together.
        shown = [row for row in _rows(part) if row["method"] != "base"]
        rows = []
        for row in shown:
            low, high = row["ci95"]
            rows.append(Row(label(row["method"]), row["value"], low, high, main=row["method"] in main))
        panels.append(Panel(f"{source.name}: {_axis(part)}", rows))
    return intervals(panels, question.title)


def _curves(question: Question, found: Sequence[tuple[Source, Mapping[str, Any]]]) -> str:
    """Draw every method over the items that were kept of a history."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for source, part in found:
        for row in _rows(part):
            name = label(row["method"]).partition(",")[0]
            lines.setdefault(name, []).append((source.items, row["value"], *row["ci95"]))
    drawn = [Line(name, sorted(points)) for name, points in lines.items()]
    return curves(drawn, "items of history", _axis(found[0][1]), question.title)


def _axis(part: Mapping[str, Any]) -> str:
    return f"{METRICS[_metric(part)]} ({'higher' if _higher(part) else 'lower'} is better)"
