"""Who waits goes in order; passing has a limit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from proper.inference.request_queue import RECENT, RequestQueue


@dataclass(frozen=True)
class One:
    name: int
    size: int
    ready: bool = True
    flow: str = ""
    answer: int = 10

    @property
    def cost(self) -> int:
        return self.size + self.answer


def line(items: list[One], patience: int) -> RequestQueue[One]:
    waiting: RequestQueue[One] = RequestQueue(patience)
    for item in items:
        waiting.add(item)
    return waiting


queued = st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12)


@given(queued=queued, rows=st.integers(0, 5), tokens=st.integers(1, 30), patience=st.integers(0, 4))
def test_what_is_taken(queued: list[tuple[int, bool]], rows: int, tokens: int, patience: int) -> None:
    items = [One(name, *rest) for name, rest in enumerate(queued)]
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


def fifo(items: list[One], rows: int, tokens: int, patience: int) -> list[One]:
    """What a single line with passing takes, written once more."""
    taken: list[One] = []
    passed: list[int] = []
    for item in items:
        width = max((other.size for other in [*taken, item]), default=0)
        if len(taken) == rows or any(count >= patience for count in passed):
            break
        if taken and width * (len(taken) + 1) > tokens:
            break
        if item.ready:
            taken.append(item)
            passed = [count + 1 for count in passed]
        else:
            passed.append(0)
    return taken


@given(queued=queued, rows=st.integers(0, 5), tokens=st.integers(1, 30), patience=st.integers(0, 4))
def test_a_single_flow_is_first_in_first_out(
    queued: list[tuple[int, bool]], rows: int, tokens: int, patience: int
) -> None:
    items = [One(name, *rest) for name, rest in enumerate(queued)]
    waiting = line(items, patience)
    assert waiting.items() == items
    assert waiting.take(rows, tokens, lambda item: item.ready) == fifo(items, rows, tokens, patience)


class Rows:
    """Rows that each hold a request for as many steps as its answer has tokens, in front of them a line."""

    def __init__(self, rows: int, **settings: int) -> None:
        self.rows, self.waiting, self.step = rows, RequestQueue[One](16, **settings), 0
        self.ends: list[tuple[int, One]] = []
        self.started: dict[int, int] = {}

    @property
    def running(self) -> list[One]:
        return [item for _, item in self.ends]

    def go(self) -> list[One]:
        self.step += 1
        self.ends = [(end, item) for end, item in self.ends if end > self.step]
        taken = self.waiting.take(self.rows - len(self.ends), 10_000, lambda item: item.ready, self.running)
        self.ends += [(self.step + item.answer, item) for item in taken]
        self.started |= {item.name: self.step for item in taken}
        return taken


asked = st.tuples(st.integers(0, 40), st.integers(1, 60), st.sampled_from("abcd"), st.integers(1, 30))


@given(asked=st.lists(asked, max_size=40), rows=st.integers(1, 9), limit=st.integers(1, 4))
def test_no_flow_starves_and_each_keeps_its_order(
    asked: list[tuple[int, int, str, int]], rows: int, limit: int
) -> None:
    arrivals = sorted(asked)
    items = [One(name, size, True, flow, answer) for name, (_, size, flow, answer) in enumerate(arrivals)]
    serving = Rows(rows, flow_rows=limit)
    order: list[One] = []
    while len(order) < len(items):
        for at, item in enumerate(items):
            if arrivals[at][0] == serving.step:
                serving.waiting.add(item)
        order += serving.go()
        free = rows - len(serving.ends)
        waits = {item.flow for item in serving.waiting.items()}
        assert not (waits and not serving.ends), "rows are idle while requests wait"
        assert not (free and waits - {item.flow for item in serving.running}), "a flow without a row gets a free one"
        assert serving.step < 40 + sum(item.answer for item in items) + 1
    for flow in "abcd":
        names = [item.name for item in order if item.flow == flow]
        assert names == sorted(names)


def test_tokens_are_shared_between_flows_that_always_wait() -> None:
    serving, given_tokens = Rows(8, flow_rows=8), Counter[str]()
    for name in range(3000):  # one asks for few long answers, the other for many short ones
        flow, answer = (("long", 40), ("short", 5))[name % 2]
        serving.waiting.add(One(name, 10, True, flow, answer))
    for _ in range(400):
        for item in serving.go():
            given_tokens[item.flow] += item.cost
    assert 0.8 < given_tokens["long"] / given_tokens["short"] < 1.25


def test_a_quiet_flow_has_a_row_in_the_next_step_beside_a_flood() -> None:
    serving, waits = Rows(8), []
    for name in range(1500):
        serving.waiting.add(One(name, 50, True, "flood", 7 + name % 40))
    for turn in range(60):
        begun, name = serving.step, 10_000 + turn
        serving.waiting.add(One(name, 5, True, "quiet", 5))
        while name not in serving.started:
            serving.go()
        waits.append(serving.started[name] - begun)
        for _ in range(5 + turn % 13):
            serving.go()
    assert sorted(waits)[int(0.95 * len(waits))] == 1, waits
    assert len(serving.running) >= 7, "but for one row, all work"


def test_a_flow_alone_gets_all_rows_again() -> None:
    serving = Rows(8)
    serving.waiting.add(One(-1, 5, True, "quiet", 1))
    for name in range(1500):
        serving.waiting.add(One(name, 50, True, "flood", 10))
    for _ in range(50):
        serving.go()
    assert len(serving.running) == 7
    for _ in range(RECENT):
        serving.go()
    assert len(serving.running) == 8


def test_a_request_that_waits_for_its_adapter_holds_up_its_own_flow_only() -> None:
    waiting = line([One(0, 1, False, "flood")], patience=2)
    for name in range(1, 6):
        waiting.add(One(name, 1, True, "flood"))
    for name in range(6, 8):
        waiting.add(One(name, 1, True, "quiet"))
    assert {item.name for item in waiting.take(9, 99, lambda item: item.ready)} == {1, 2, 6, 7}
