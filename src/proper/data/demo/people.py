"""People: who is in which group, and what each of them does with each topic.

On four topics people do what their group does, and the groups' habits are rows of a Latin square over topics and
choices, less one column. On three personal topics everybody has a way of their own, dealt out evenly within each group:
too many ways for a few groups to hold. The topic says nothing about the group and the choice next to nothing (each
group lacks one on its shared topics); the two together do, and on personal topics not even these. Knows nothing about
phrases.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeVar

from proper.data.demo.settings import CHOICES, SHARED, TOPICS, DemoSettings

Card = TypeVar("Card")


@dataclass(frozen=True, slots=True)
class DemoUser:
    """One person.

    Attributes:
        id: the user id.
        group: index of the group.
        habit: (topics,): the index of the choice made for each topic.
        closing: the index of the sign-off.
    """

    id: str
    group: int
    habit: tuple[int, ...]
    closing: int


@dataclass(frozen=True, slots=True)
class World:
    """Everybody, and the topics on which people follow their group (`shared`) or only themselves (`personal`)."""

    people: tuple[DemoUser, ...]
    shared: tuple[int, ...]
    personal: tuple[int, ...]


def make_world(settings: DemoSettings, closings: int) -> World:
    """Draw topics' roles and people; groups differ in size by one person at most.

    Args:
        settings: sizes, shares and the seed.
        closings: how many sign-offs there are to choose from, at least one.
    """
    rng = random.Random(f"{settings.task} people {settings.seed}")
    topics = rng.sample(range(TOPICS), TOPICS)
    shared, personal = topics[:SHARED], topics[SHARED:]
    rows = [(start, *range(start + 1, CHOICES), *range(start)) for start in rng.sample(range(CHOICES), CHOICES)]
    groups = [index % settings.groups for index in range(settings.people)]
    rng.shuffle(groups)
    ways = [shuffled(list(permutations(range(CHOICES), len(personal))), rng) for _ in range(settings.groups)]
    signs = [shuffled(range(closings if settings.own_traits else 1), rng) for _ in range(settings.groups)]
    width = len(str(settings.people))
    people = []
    for number, group in enumerate(groups, start=1):
        choices = dict(zip([*shared, *personal], [*rows[group][:SHARED], *next(ways[group])], strict=True))
        habit = tuple(choices[topic] for topic in range(TOPICS))
        people.append(DemoUser(f"u{number:0{width}d}", group, habit, next(signs[group])))
    return World(tuple(people), tuple(shared), tuple(personal))


def shuffled(cards: Sequence[Card], rng: random.Random) -> Iterator[Card]:
    """Deal cards without end: all in random order, then all in another, so that each comes up equally often."""
    while True:
        yield from rng.sample(cards, len(cards))
