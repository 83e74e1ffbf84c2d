"""Settings of the demo data, and its users: their group, and their choice for each topic.

On four shared topics users follow their group; the groups' choices are rows of a Latin square over topics and choices,
less one column. On three personal topics each user has an individual combination of choices, dealt out evenly within
each group: too many combinations for a few groups to represent. The topic alone says nothing about the group, and the
choice alone almost nothing (each group lacks one choice on its shared topics). Topic and choice together identify the
group on shared topics, but not on personal ones.

Further groups than choices are rows of further Latin squares that are orthogonal to the first: any two groups agree on
at most one shared topic, so two topics with their choices identify a group.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, TypeVar, get_args

from proper.errors import InputError

Value = TypeVar("Value")
DemoTask = Literal["classification", "rating", "style"]

CHOICES = 5  # every phrase bank has five choices and seven topics
TOPICS = CHOICES + 2
SHARED = 4  # topics on which users follow their group; the others are personal
GROUPS = CHOICES * (CHOICES - 1)  # rows of all mutually orthogonal Latin squares of this size, a prime


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Settings of the demo data.

    Attributes:
        task: what users do with a text: tag it, rate it, or write it in their own style.
        users: number of users.
        groups: number of latent groups, at most twenty.
        items: minimum and maximum interactions of a user; the number is uniform in between.
        own_traits: share of a user's interactions that are on personal topics, on which users do not follow their
            group. Above zero, users also have individual sign-offs in the style task.
        noise: probability that an answer departs at random from the user's habit.
        seed: seed of all randomness.

    Raises:
        InputError: a value is impossible; the message names it.
    """

    task: DemoTask = "classification"
    users: int = 300
    groups: int = 5
    items: tuple[int, int] = (16, 32)
    own_traits: float = 0.35
    noise: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.task not in get_args(DemoTask):
            raise InputError(f"demo task: '{self.task}' is not one of {', '.join(get_args(DemoTask))}")
        if not 1 <= self.groups <= GROUPS:
            raise InputError(f"demo groups: {self.groups} is not between 1 and {GROUPS}")
        if self.users < self.groups:
            raise InputError(f"demo users: {self.users} users cannot fill {self.groups} groups")
        fewest, most = self.items
        if not 2 <= fewest <= most:
            raise InputError(f"demo items: need 2 <= fewest <= most, not {fewest} and {most}")
        for name, share in (("own_traits", self.own_traits), ("noise", self.noise)):
            if not 0 <= share < 1:
                raise InputError(f"demo {name}: {share} is not at least 0 and below 1")
        if self.seed < 0:
            raise InputError(f"demo seed: {self.seed} is negative")


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

    users: tuple[DemoUser, ...]
    shared: tuple[int, ...]
    personal: tuple[int, ...]


def make_world(settings: DemoSettings, closings: int) -> World:
    """Draw the topics' roles and the users; group sizes differ by at most one user.

    Args:
        settings: sizes, shares and the seed.
        closings: number of sign-offs to choose from, at least one.
    """
    rng = random.Random(f"{settings.task} people {settings.seed}")  # the text is part of the seed
    topics = rng.sample(range(TOPICS), TOPICS)
    shared, personal = topics[:SHARED], topics[SHARED:]
    starts = rng.sample(range(CHOICES), CHOICES)
    rows = [[(start + step * at) % CHOICES for at in range(SHARED)] for step in range(1, CHOICES) for start in starts]
    groups = [index % settings.groups for index in range(settings.users)]
    rng.shuffle(groups)
    habits = [shuffled(list(permutations(range(CHOICES), len(personal))), rng) for _ in range(settings.groups)]
    closing_of = [shuffled(range(closings if settings.own_traits else 1), rng) for _ in range(settings.groups)]
    width = len(str(settings.users))
    users = []
    for number, group in enumerate(groups, start=1):
        choices = dict(zip([*shared, *personal], [*rows[group], *next(habits[group])], strict=True))
        habit = tuple(choices[topic] for topic in range(TOPICS))
        users.append(DemoUser(f"u{number:0{width}d}", group, habit, next(closing_of[group])))
    return World(tuple(users), tuple(shared), tuple(personal))


def shuffled(values: Sequence[Value], rng: random.Random) -> Iterator[Value]:
    """Yield `values` endlessly in random order, reshuffled after each full pass, so that all occur equally often."""
    while True:
        yield from rng.sample(values, len(values))
