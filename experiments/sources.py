"""The committed results that the questions read, and the pairs of methods that each compares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from proper.evaluation.comparisons import CONTROLS
from proper.run_folder import STEPS


@dataclass(frozen=True)
class Source:
    """A committed result.

    Attributes:
        pairs: (method, against) of its table; a result with the opposite order is negated.
        inside: keys of the part of the file that is used.
        items: number of history items kept, for curves.
    """

    name: str
    file: str
    pairs: tuple[tuple[str, str], ...]
    inside: tuple[str, ...] = ()
    items: int = 0


RIVALS = (*STEPS, *CONTROLS, ("users", "user-majority"), ("users", "global-majority"))
PROGRESSIVE = (("users", "end-to-end"),)
MORE_ITEMS = "users[users.max_items=64]"
CATEGORY, HEADLINE = (
    f"users[rows={asked}][population.max_tokens=150000][groups.max_tokens=150000][users.max_items=12]"
    for asked in ("Category", "Headline")
)
TITLE_ONLY, ALL_TITLE = "population[rows=Title]", "groups-shared-e[rows=Title]"
HEADLINE_ONLY, ALL_HEADLINE = "population[rows=Headline]", "groups-shared-e[rows=Headline]"
GROUPS_GRID = "groups[groups.{}={}]"
AUTO = GROUPS_GRID.format("experts", "auto")


def grid_of(key: str, values: Sequence[object]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of a grid over one setting of stage 2: each value against the default."""
    return (*((GROUPS_GRID.format(key, value), "groups") for value in values), ("groups", "population"))


def short_history(items: int) -> Source:
    """Return the result of users with this many history items."""
    others = ("groups", "oppu", "per-user-only", "rag", "user-majority")
    pairs = [(f"users[history={items}]", f"{other}[history={items}]") for other in others]
    pairs += [(f"groups[history={items}]", "population"), (f"users[history={items}]", "population")]
    return Source(f"{items} item{'s' if items > 1 else ''}", f"findings/short-{items}.json", tuple(pairs), items=items)


USER_FORMS = ("users", "users+head")
"""The forms of Users that the main table compares with every other row."""
EQUAL_OPPU = "oppu[users.batch_size=2][users.layers=last 10]"
"""OPPU with the steps and the rows of Users: its own batch of 16 needs eight times the rows for as many steps."""
MORE_ROWS = "users[users.max_items=128]"
"""Users with adapters that are trained on 128 items instead of 24."""
LABELS, TEXT = "labels", "text"
MAIN = {
    "huffpost-label": LABELS,
    "movielens-rating": LABELS,
    "git-subject": TEXT,
    "git-area": LABELS,
    "huffpost-headline": TEXT,
}
FURTHER = {
    "huffpost-label": (("half the tokens in stages 1 and 2", "shorter-huffpost-label"),),
    "movielens-rating": (
        ("half the tokens in stage 2", "rows-movielens-rating"),
        ("stage 1 evenly over users, half the tokens in stage 2", "even-movielens-rating"),
        ("stage 1 evenly over users, four times the tokens in it", "longer-movielens-rating"),
        ("stage 1 evenly over users, half the tokens", "wider-movielens-rating"),
        ("50 users, stage 1 evenly over users, half the tokens", "small-movielens-rating"),
        ("50 users, the same, rivals", "rivals-movielens-rating"),
        ("50 users, the same, other training", "others-movielens-rating"),
    ),
}
"""Further results of a set, which no job of the queue makes: what differs from its main run, and the file."""
LAST_LAYERS = tuple(("users[groups.layers=last 10][users.layers=last 10]", other) for other in ("users", "groups"))


def constant_of(task: str) -> str:
    """Return the trivial method that a population stage has to beat: the best constant, or the input's first words."""
    return "global-majority" if task == LABELS else "lead"


def main_sources(name: str, task: str) -> Iterator[Source]:
    """Yield the results of one set of the main table."""
    yield Source(name, f"findings/main-{name}.json", _rows(task))
    if name == "huffpost-label":
        yield Source("huffpost-label, layers", "findings/layers-huffpost-label.json", LAST_LAYERS)
        yield Source("huffpost-label, twice the tokens", "findings/longer-huffpost-label.json", _rows(task))
    for difference, file in FURTHER.get(name, ()):
        yield Source(f"{name}, {difference}", f"findings/{file}.json", _rows(task))


def _rows(task: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs of a set's table: the steps, the controls, and each form of Users against every other row."""
    trivial = ("user-majority", "user-majority-same", *(("prior", "head+prior") if task == LABELS else ()))
    rivals = ("rag", "oppu", "oppu[users.layers=last 10]", EQUAL_OPPU, "end-to-end", "population-more")
    others = dict.fromkeys((constant_of(task), *trivial, *rivals))
    more = [("users+rag", "users"), ("users+head", "users"), ("users+head", "groups+head"), ("users+head", "swapped")]
    more += [(MORE_ROWS, other) for other in ("groups", "users", "head+prior")]
    more += [("users+prior", other) for other in ("users", "head+prior")]
    forms = ((form, other) for form in USER_FORMS for other in others)
    return (("population", constant_of(task)), *STEPS, *CONTROLS, *forms, *more)
