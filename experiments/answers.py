"""How a method is named on the page, and the rules that word an answer from what the tests show.

Knows nothing about numbers or files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from proper.evaluation.comparisons import CONTROLS
from proper.reports.formats import method_name


class Shown(Protocol):
    """A paired test: the method, what it is compared with, and what the test shows."""

    @property
    def method(self) -> str: ...  # noqa: D102
    @property
    def against(self) -> str: ...  # noqa: D102
    @property
    def verdict(self) -> str: ...  # noqa: D102


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
"""What goes with `rows`, and is not what a method is about."""


def label(method: str) -> str:
    """Return a method's name as a reader sees it, the changes in brackets told by their letters."""
    name, _, rest = method.partition("[")
    changes = [change.partition("=") for change in re.findall(r"\[([^\]]+)\]", f"[{rest}")]
    hidden = BUDGETS if any(key == "rows" for key, _, _ in changes) else ()
    told = [
        f"{SETTINGS.get(key, key)} {'' if key == 'rows' else '= '}{value}"
        for key, _, value in changes
        if key not in hidden and rest
    ]
    return ", ".join([method_name(name), *told])


def verdicts(tests: Tests, pair: tuple[str, str]) -> dict[str, str]:
    """Return what every source shows of a pair."""
    return {
        source: test.verdict for source, found in tests.items() for test in found if (test.method, test.against) == pair
    }


def by_set(tests: Tests, pair: tuple[str, str]) -> str:
    """Say of a pair on which sets it is better, worse, or neither is shown."""
    shown = verdicts(tests, pair)
    parts = []
    for verdict, words in (
        ("better", "{0} beats {1} on {2}"),
        ("worse", "{0} is worse than {1} on {2}"),
        ("neither", "no difference between {0} and {1} is shown on {2}"),
    ):
        sets = [
            name for name, found in shown.items() if (found if found in ("better", "worse") else "neither") == verdict
        ]
        if sets:
            parts.append(words.format(label(pair[0]), label(pair[1]), " and ".join(sets)))
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def steps(tests: Tests) -> str:
    """Say where each step of the ladder gains."""
    return " ".join(by_set(tests, pair) for pair in (("groups", "population"), ("users", "groups")))


def grid(default: str) -> Callable[[Tests], str]:
    """Return the rule of a grid: which values are told apart from the default."""

    def answer(tests: Tests) -> str:
        told: dict[str, list[str]] = {"better": [], "worse": []}
        for place, (source, of_source) in enumerate(tests.items()):
            for test in of_source:
                if test.against == "groups" and test.verdict in told:
                    told[test.verdict].append(label(test.method) + (f" ({source})" if place else ""))
        if not any(told.values()):
            return f"No value is told apart from the default, {default}."
        parts = [
            f"{verdict} than the default ({default}): {'; '.join(names)}" for verdict, names in told.items() if names
        ]
        text = ". ".join(parts)
        rest = "" if told["better"] else ". No value beats the default"
        return text[:1].upper() + text[1:] + rest + "."

    return answer


def controls(tests: Tests) -> str:
    """Claim personalization on a set only where every control is beaten."""
    parts = []
    for source, found in tests.items():
        pairs = {(test.method, test.against): test.verdict for test in found}
        lost = [f"{label(a)} over {label(b)}" for a, b in CONTROLS if pairs.get((a, b)) not in ("better", None)]
        stages = {method for method, _ in pairs}
        missing = [label(b) for a, b in CONTROLS if a in stages and (a, b) not in pairs]
        won = [f"{label(a)} over {label(b)}" for a, b in CONTROLS if pairs.get((a, b)) == "better"]
        if lost:
            shown = f"; shown is that of {'; '.join(won)}" if won else ""
            parts.append(f"On {source} personalization is not claimed: no gain shown of {'; '.join(lost)}{shown}.")
        elif missing:
            parts.append(f"On {source} no claim yet: {', '.join(missing)} was not run.")
        else:
            parts.append(f"On {source} every control is beaten: the gain comes from knowing the user.")
        if pairs.get(("users", "user-majority")) == "worse":
            parts.append(f"On {source} a user's own usual answer, without a model, is better than Users.")
    return " ".join(parts)


def each(*pairs: tuple[str, str]) -> Callable[[Tests], str]:
    """Return the rule that says each pair in turn."""
    return lambda tests: " ".join(filter(None, (by_set(tests, pair) for pair in pairs)))


def short(tests: Tests) -> str:
    """Say at how many items a user's adapter is worth it against the group model and the other methods."""
    parts = []
    for source, found in tests.items():
        own = [test for test in found if test.method.startswith("users")]
        beaten = [label(test.against).partition(",")[0] for test in own if test.verdict == "better"]
        lost = [label(test.against).partition(",")[0] for test in own if test.verdict == "worse"]
        said = [f"beats {', '.join(beaten)}" if beaten else "", f"loses to {', '.join(lost)}" if lost else ""]
        told = " and ".join(filter(None, said))
        parts.append(f"{source}: Users {told or 'is not told apart from any other method'}.")
    return " ".join(parts)
