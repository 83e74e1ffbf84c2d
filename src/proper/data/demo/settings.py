"""Settings of the demo generator; impossible settings are refused on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from proper.errors import InputError

DemoTask = Literal["classification", "rating", "style"]

CHOICES = 5  # every phrase bank has five choices and seven topics
TOPICS = CHOICES + 2
SHARED = 4  # topics on which users follow their group; the others are personal


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Settings of the demo data.

    Attributes:
        task: what users do with a text: tag it, rate it, or write it in their own style.
        people: number of users.
        groups: number of latent groups, at most five (the number of choices).
        items: minimum and maximum interactions of a user; the number is uniform in between.
        own_traits: share of a user's interactions that are on personal topics, on which users do not follow their
            group. Above zero, users also have individual sign-offs in the style task.
        noise: probability that an answer departs at random from the user's habit.
        seed: seed of all randomness.

    Raises:
        InputError: a value is impossible; the message names it.
    """

    task: DemoTask = "classification"
    people: int = 300
    groups: int = 5
    items: tuple[int, int] = (16, 32)
    own_traits: float = 0.35
    noise: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.task not in get_args(DemoTask):
            raise InputError(f"demo task: '{self.task}' is not one of {', '.join(get_args(DemoTask))}")
        if not 1 <= self.groups <= CHOICES:
            raise InputError(f"demo groups: {self.groups} is not between 1 and {CHOICES}, the number of choices")
        if self.people < self.groups:
            raise InputError(f"demo people: {self.people} people cannot fill {self.groups} groups")
        fewest, most = self.items
        if not 2 <= fewest <= most:
            raise InputError(f"demo items: need 2 <= fewest <= most, not {fewest} and {most}")
        for name, share in (("own_traits", self.own_traits), ("noise", self.noise)):
            if not 0 <= share < 1:
                raise InputError(f"demo {name}: {share} is not at least 0 and below 1")
        if self.seed < 0:
            raise InputError(f"demo seed: {self.seed} is negative")
