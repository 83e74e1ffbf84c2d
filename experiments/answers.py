"""Names of methods on the findings page, and rules that turn verdicts of tests into sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from experiments.sources import USER_FORMS
from proper.evaluation.comparisons import CONTROLS, TRIVIAL
from proper.reports.formats import method_name, signed
from proper.run_folder import STEPS


class Shown(Protocol):
    """A paired test: the method, what it is compared with, and what the test shows."""

    @property
    def method(self) -> str: ...  # noqa: D102
    @property
    def against(self) -> str: ...  # noqa: D102
    @property
    def verdict(self) -> str: ...  # noqa: D102
    @property
    def relative(self) -> float: ...  # noqa: D102


Tests = Mapping[str, Sequence[Shown]]
"""Tests by the name of their source."""

SETTINGS = {
    "groups.experts": "E",
    "groups.user_embedding": "D",
    "groups.constraint.kind": "constraint",
    "users.max_items": "items at most",
    "history": "items",
    "rows": "trained on",
}
BUDGETS = ("population.max_tokens", "groups.max_tokens", "users.max_items")
"""Settings that accompany `rows` and are left out of a method's name."""


def label(method: str) -> str:
    """Return a method's display name with its overrides, such as "Groups, E = 8"."""
    name, _, rest = method.partition("[")
    changes = [change.partition("=") for change in re.findall(r"\[([^\]]+)\]", f"[{rest}")]
    hidden = BUDGETS if any(key == "rows" for key, _, _ in changes) else ()
    overrides = [
        f"{SETTINGS.get(key, key)} {'' if key == 'rows' else '= '}{value}"
        for key, _, value in changes
        if key not in hidden and rest
    ]
    return ", ".join([method_name(name), *overrides])


def verdicts(tests: Tests, pair: tuple[str, str]) -> dict[str, str]:
    """Return the verdict of a pair in every source."""
    return {
        source: test.verdict for source, found in tests.items() for test in found if (test.method, test.against) == pair
    }


def by_set(tests: Tests, pair: tuple[str, str]) -> str:
    """Return a sentence on the sources in which a pair is better, worse, or not significantly different."""
    shown = verdicts(tests, pair)
    parts = []
    for verdict, words in (
        ("better", "{0} beats {1} on {2}"),
        ("worse", "{0} is worse than {1} on {2}"),
        ("neither", "{0} and {1} do not differ significantly on {2}"),
    ):
        sets = [
            name for name, found in shown.items() if (found if found in ("better", "worse") else "neither") == verdict
        ]
        if sets:
            parts.append(words.format(label(pair[0]), label(pair[1]), " and ".join(sets)))
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def steps(tests: Tests) -> str:
    """Return the answer on the steps between stages."""
    return " ".join(by_set(tests, pair) for pair in (("groups", "population"), ("users", "groups")))


def grid(default: str) -> Callable[[Tests], str]:
    """Return the rule of a grid: which values differ significantly from the default."""

    def answer(tests: Tests) -> str:
        found: dict[str, list[str]] = {"better": [], "worse": []}
        for index, (source, of_source) in enumerate(tests.items()):
            for test in of_source:
                if test.against == "groups" and test.verdict in found:
                    found[test.verdict].append(label(test.method) + (f" ({source})" if index else ""))
        if not any(found.values()):
            return f"No value differs significantly from the default, {default}."
        parts = [
            f"{verdict} than the default ({default}): {'; '.join(names)}" for verdict, names in found.items() if names
        ]
        text = ". ".join(parts)
        rest = "" if found["better"] else ". No value beats the default"
        return text[:1].upper() + text[1:] + rest + "."

    return answer


def controls(tests: Tests) -> str:
    """Return the claim of personalization by source: made only where every control is beaten."""
    parts = []
    for source, found in tests.items():
        pairs = {(test.method, test.against): test.verdict for test in found}
        lost = [f"{label(a)} over {label(b)}" for a, b in CONTROLS if pairs.get((a, b)) not in ("better", None)]
        stages = {method for method, _ in pairs}
        missing = [label(b) for a, b in CONTROLS if a in stages and (a, b) not in pairs]
        won = [f"{label(a)} over {label(b)}" for a, b in CONTROLS if pairs.get((a, b)) == "better"]
        if lost:
            shown = f"; beaten: {'; '.join(won)}" if won else ""
            parts.append(f"On {source} personalization is not claimed; no significant gain: {'; '.join(lost)}{shown}.")
        elif missing:
            parts.append(f"On {source} no claim yet: {', '.join(missing)} was not run.")
        else:
            parts.append(f"On {source} every control is beaten: the gain comes from information about the user.")
        if pairs.get(("users", "user-majority")) == "worse":
            parts.append(f"On {source} the user's majority answer, without a model, is better than Users.")
    return " ".join(parts)


def each(*pairs: tuple[str, str]) -> Callable[[Tests], str]:
    """Return the rule that reports each pair in turn."""
    return lambda tests: " ".join(filter(None, (by_set(tests, pair) for pair in pairs)))


def short(tests: Tests) -> str:
    """Return the methods that a user's adapter beats or loses to, by number of history items."""
    parts = []
    for source, found in tests.items():
        own = [test for test in found if test.method.startswith("users")]
        beaten = [label(test.against).partition(",")[0] for test in own if test.verdict == "better"]
        lost = [label(test.against).partition(",")[0] for test in own if test.verdict == "worse"]
        parts_of = [f"beats {', '.join(beaten)}" if beaten else "", f"loses to {', '.join(lost)}" if lost else ""]
        text = " and ".join(filter(None, parts_of))
        parts.append(f"{source}: Users {text or 'does not differ significantly from any other method'}.")
    return " ".join(parts)


GOALS = dict(zip(STEPS, (0.0469, 0.0502), strict=True))
"""The paper's relative gains of the two steps on LaMP with 7 B."""


def main_table(constants: Mapping[str, str]) -> Callable[[Tests], str]:
    """Return the rule of the main table: the sets on which the steps reach the goals, and Users beats every row.

    Args:
        constants: by set, the trivial method that a population stage has to beat.
    """

    def answer(tests: Tests) -> str:
        sets = {name: _by_pair(tests[name]) for name in constants if name in tests}
        gained = [name for name, found in sets.items() if _steps_reach(found, constants[name])]
        trivial = [name for name, found in sets.items() if not set(TRIVIAL) & set(_not_beaten(found))]
        goals = " and ".join(f"{signed(100 * goal, 2)} %" for goal in GOALS.values())
        parts = [
            f"The two steps reach the paper's gains, {goals}, each significantly and over a population that beats the "
            f"best constant, on {_count(gained, sets)}. Users beats every row that needs no model on "
            f"{_count(trivial, sets)}."
        ]
        for form in USER_FORMS:
            compared = {name: found for name, found in sets.items() if any(method == form for method, _ in found)}
            first = [name for name, found in compared.items() if not _not_beaten(found, form)]
            if compared:
                parts.append(f"{label(form)} beats every row that it was compared with on {_count(first, compared)}.")
        return " ".join(parts)

    return answer


def score_card(constants: Mapping[str, str]) -> Callable[[Tests], list[str]]:
    """Return the rule of the main table's summary: a row of a Markdown table for each result with both steps.

    Args:
        constants: by set, the trivial method that a population stage has to beat.
    """

    def summary(tests: Tests) -> list[str]:
        heads = [
            "result",
            "Population over the constant",
            *(f"{label(method)} over {label(against)}" for method, against in STEPS),
            *(f"{label(form)} does not beat" for form in USER_FORMS),
        ]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for source, tests_of in tests.items():
            found = _by_pair(tests_of)
            if not set(STEPS) <= set(found):
                continue
            constant = ("population", constants[set_of(source)])
            cells = [_change(found.get(pair)) for pair in (constant, *STEPS)]
            lost = [
                _listed(_not_beaten(found, form)) if any(method == form for method, _ in found) else "–"
                for form in USER_FORMS
            ]
            lines.append(f"| {' | '.join((source, *cells, *lost))} |")
        return lines

    return summary


def set_of(source: str) -> str:
    """Return the set that a source of the main table measures; its name may say more after a comma."""
    return source.partition(",")[0]


def _by_pair(tests: Sequence[Shown]) -> dict[tuple[str, str], Shown]:
    return {(test.method, test.against): test for test in tests}


def _not_beaten(found: Mapping[tuple[str, str], Shown], form: str = "users") -> dict[str, Shown]:
    """Return the rows beside those of the stages that a form of Users does not beat, with the tests against them."""
    own = ("groups", "groups+head", "users")
    rivals = {against: test for (method, against), test in found.items() if method == form and against not in own}
    return {against: test for against, test in rivals.items() if test.verdict != "better"}


def _listed(rows: Mapping[str, Shown]) -> str:
    """Return the names of rows that are not beaten, the better ones marked."""
    names = [label(row) + (" (better)" if test.verdict == "worse" else "") for row, test in rows.items()]
    return ", ".join(names) or "none"


def _steps_reach(found: Mapping[tuple[str, str], Shown], constant: str) -> bool:
    """Return whether both steps reach the goals, over a population that beats `constant`."""
    base = found.get(("population", constant))
    return base is not None and base.verdict == "better" and all(_reaches(found.get(p), GOALS[p]) for p in GOALS)


def _reaches(test: Shown | None, goal: float) -> bool:
    return test is not None and test.verdict == "better" and test.relative >= goal


def _count(names: Sequence[str], sets: Mapping[str, object]) -> str:
    return f"{len(names)} of {len(sets)} sets" + (f" ({', '.join(names)})" if names else "")


def _change(test: Shown | None) -> str:
    if test is None:
        return "not measured"
    change = f"{signed(100 * test.relative, 1)} %" if math.isfinite(test.relative) else "from 0"
    return change if test.verdict in ("better", "worse") else f"{change} (not significant)"
