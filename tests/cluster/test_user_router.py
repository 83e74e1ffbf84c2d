"""Which replica answers a user, and how the HTTP server's engine deals with replicas that die or scale."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.filterwarnings("default")  # Ray warns of its own deprecated settings.

from ray.exceptions import RayActorError  # noqa: E402

from proper.adapters.slot_cache import CacheCounts  # noqa: E402
from proper.cluster.deployment import parse_replicas  # noqa: E402
from proper.cluster.serving import ClusterEngine, total  # noqa: E402
from proper.cluster.user_router import ranked  # noqa: E402
from proper.errors import InputError  # noqa: E402
from proper.inference.requests import EngineStats, Event, Finished, Request, Started, Token  # noqa: E402

NAMES = st.lists(st.text("abc0", min_size=1, max_size=6), min_size=1, max_size=6, unique=True)


def owner(user: str, replicas: list[str], tenant: str = "") -> str:
    """The replica that is tried first."""
    return ranked(Request((1,), user, tenant), replicas)[0][0]


@given(NAMES, st.text(max_size=8), st.text(max_size=8), st.randoms())
def test_an_owner_moves_only_with_its_replica(replicas: list[str], tenant: str, user: str, order: Any) -> None:
    first = owner(user, replicas, tenant)
    shuffled = order.sample(replicas, len(replicas))
    assert owner(user, shuffled, tenant) == first
    for gone in replicas:
        left = [name for name in replicas if name != gone]
        if left:
            assert (owner(user, left, tenant) == first) == (gone != first)


@given(NAMES, st.text(max_size=8))
def test_a_full_owner_spills_to_two_others(replicas: list[str], user: str) -> None:
    groups = ranked(Request((1,), user), replicas)
    assert len(groups[0]) == 1 and [len(group) for group in groups[1:]] == [min(2, len(replicas) - 1)] * (
        len(replicas) > 1
    )
    named = [name for group in groups for name in group]
    assert len(set(named)) == len(named) and set(named) <= set(replicas)


def test_users_are_spread_evenly_and_by_tenant() -> None:
    replicas = [f"r{at}" for at in range(4)]
    counts = Counter(owner(f"u{at}", replicas) for at in range(4000))
    assert set(counts) == set(replicas) and min(counts.values()) > 900
    assert any(owner(f"u{at}", replicas, "one") != owner(f"u{at}", replicas, "other") for at in range(10))
    # ("a", "bc") and ("ab", "c") are different people.
    assert any(
        owner(f"b{at}", [str(at), "x", "y"], "a") != owner(str(at), [str(at), "x", "y"], "ab") for at in range(99)
    )


def test_a_request_without_a_user_goes_to_the_less_loaded_of_two() -> None:
    replicas = ["a", "b", "c"]
    drawn = {tuple(sorted(ranked(Request((1,)), replicas)[0])) for _ in range(200)}
    assert drawn == {("a", "b"), ("a", "c"), ("b", "c")}
    assert ranked(None, ["a"]) == [["a"]] and ranked(Request((1,), "u"), []) == []


@pytest.mark.parametrize(("text", "found"), [(None, (3, 3)), ("2", (2, 2)), ("2:8", (2, 8)), ("4:4", (4, 4))])
def test_numbers_of_replicas(text: str | None, found: tuple[int, int]) -> None:
    assert parse_replicas(text, 3) == found


@pytest.mark.parametrize("text", ["0", "", "8:2", "2:", "a", "-1", "1:2:3"])
def test_what_is_no_number_of_replicas(text: str) -> None:
    with pytest.raises(InputError, match=r"^--replicas .*: write a number of replicas, or MIN:MAX$"):
        parse_replicas(text, 3)


def stats(running: int, steps: int, tokens: dict[str, int]) -> EngineStats:
    """Figures of one engine."""
    return EngineStats(1, running, 8, 4, 2, 0, 100, steps, 30, 5, tokens, 1, 0, CacheCounts(7, 4, 1, 0))


def test_counters_outlive_a_replica_and_gauges_do_not() -> None:
    one, two = stats(3, 10, {"users": 5}), stats(2, 20, {"users": 1, "none": 2})
    both, left = total([one, two], []), total([one], [two])
    assert (both.running, both.replicas, left.running, left.replicas) == (5, 2, 3, 1)
    assert both.steps == left.steps == 30 and both.tokens == left.tokens == {"users": 6, "none": 2}
    assert both.adapters == left.adapters == CacheCounts(14, 8, 2, 0)


ANSWER: tuple[Event, ...] = (Started("users", 1), Token(4), Token(7), Token(9), Finished("length"))


class ScriptedHandle:
    """Stands for replicas that die after so many events, in turn; the last one of the script answers the rest."""

    def __init__(self, script: list[tuple[tuple[Event, ...], int]]) -> None:
        self.script = script

    def options(self, **_: object) -> Any:
        return SimpleNamespace(remote=lambda _: self._events())

    async def _events(self) -> AsyncIterator[list[Event]]:
        events, lives = self.script.pop(0)
        for event in events[:lives]:
            await asyncio.sleep(0)
            yield [event]
        if lives < len(events):
            raise RayActorError


@pytest.fixture
def answered() -> Iterator[Any]:
    """`answered(script)`: the events that a sink gets."""
    engines: list[tuple[ClusterEngine, threading.Thread]] = []

    def ask(script: list[tuple[tuple[Event, ...], int]]) -> list[Event]:
        loaded: Any = SimpleNamespace(limit=100, embeddings=50)
        handle: Any = ScriptedHandle(script)
        model: Any = None
        engine = ClusterEngine(handle, model, loaded)
        thread = threading.Thread(target=engine.run)
        thread.start()
        engines.append((engine, thread))
        events: list[Event] = []
        engine.submit(Request((1, 2), "u"), events.append).result(10)
        return events

    yield ask
    for engine, thread in engines:
        engine.close()
        thread.join()


@pytest.mark.parametrize("lives", range(5))
def test_another_replica_continues_an_answer(answered: Any, lives: int) -> None:
    assert answered([(ANSWER, lives), (ANSWER, 5)]) == list(ANSWER)
    assert answered([(ANSWER, lives), (ANSWER, 1), (ANSWER, 5)]) == list(ANSWER)


def test_an_answer_is_given_up_when_its_replicas_keep_dying(answered: Any) -> None:
    events = answered([(ANSWER, 1), (ANSWER, 0), (ANSWER, 2)])
    assert events[:2] == list(ANSWER[:2]) and events[2:] == [Finished("lost", "RayActorError")]


def test_an_answer_never_mixes_two_versions_of_a_user(answered: Any) -> None:
    newer = (Started("users", 2), *ANSWER[1:])
    other = (ANSWER[0], Token(5), *ANSWER[2:])
    for second in (newer, other):
        events = answered([(ANSWER, 3), (second, 5), (second, 5)])
        assert events[:-1] == list(ANSWER[:3]) and events[-1].reason == "lost"
