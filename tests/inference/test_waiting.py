"""Who waits goes in order; passing has a limit."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from proper.inference.waiting import Waiting


@dataclass(frozen=True)
class One:
    name: int
    size: int
    ready: bool


def line(items: list[One], patience: int) -> Waiting[One]:
    waiting: Waiting[One] = Waiting(patience)
    for item in items:
        waiting.add(item)
    return waiting


people = st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12)


@given(people=people, rows=st.integers(0, 5), tokens=st.integers(1, 30), patience=st.integers(0, 4))
def test_what_is_taken(people: list[tuple[int, bool]], rows: int, tokens: int, patience: int) -> None:
    items = [One(name, *rest) for name, rest in enumerate(people)]
    waiting = line(items, patience)
    taken = waiting.take(rows, tokens, lambda item: item.ready)
    assert all(item.ready for item in taken) and len(taken) <= rows
    assert taken == sorted(taken, key=lambda item: item.name)
    assert len(taken) <= 1 or len(taken) * max(item.size for item in taken) <= tokens
    assert waiting.items() == [item for item in items if item not in taken]
    unready = [item.name for item in items if not item.ready]
    if unready:
        assert sum(item.name > unready[0] for item in taken) <= max(patience, 0)
    if rows and items and items[0].ready:
        assert taken, "the first goes if it can"


def test_passing_adds_up() -> None:
    waiting = line([One(0, 1, False)], patience=2)
    for name in (1, 2):
        waiting.add(One(name, 1, True))
        assert [item.name for item in waiting.take(9, 9, lambda item: item.ready)] == [name]
    waiting.add(One(3, 1, True))
    assert waiting.take(9, 9, lambda item: item.ready) == []
    assert [item.name for item in waiting.take(9, 9, lambda item: True)] == [0, 3]


def test_leaving_the_line() -> None:
    waiting = line([One(0, 1, True), One(1, 1, True)], patience=1)
    assert [item.name for item in waiting.remove(lambda item: item.name == 0)] == [0]
    assert len(waiting) == 1
