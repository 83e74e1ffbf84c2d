"""Demo users: their group, and their choice for each topic.

On four shared topics users follow their group; the groups' choices are rows of a Latin square over topics and choices,
less one column. On three personal topics each user has an individual combination of choices, dealt out evenly within
each group: too many combinations for a few groups to represent. The topic alone says nothing about the group, and the
choice alone almost nothing (each group lacks one choice on its shared topics). Topic and choice together identify the
group on shared topics, but not on personal ones.
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
    """One demo user.

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
    """All users, the topics on which they follow their group (`shared`), and the individual ones (`personal`)."""

    people: tuple[DemoUser, ...]
    shared: tuple[int, ...]
    personal: tuple[int, ...]


def make_world(settings: DemoSettings, closings: int) -> World:
    """Draw the topics' roles and the users; group sizes differ by at most one user.

    Args:
        settings: sizes, shares and the seed.
        closings: number of sign-offs to choose from, at least one.
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
    """Yield `cards` endlessly in random order, reshuffled after each full pass, so that all occur equally often."""
    while True:
        yield from rng.sample(cards, len(cards))
