"""Demo users who change: later interactions of the users of a demo, in periods, with a planted change of habits.

The kinds of change:

    stable    the habits stay as they are
    abrupt    from the second period on, the user has the habits of a member of another group
    slow      the same, topic by topic: in the last period all topics have changed
    back      as abrupt, but in the second half of the periods the user has the old habits again
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from proper.data.demo.banks import draw, load_bank
from proper.data.demo.generate import compose, own_plan
from proper.data.demo.users import TOPICS, DemoSettings, DemoUser, make_world

Change = Literal["stable", "abrupt", "slow", "back"]
CHANGES: tuple[Change, ...] = get_args(Change)


@dataclass(frozen=True, slots=True)
class LaterItem:
    """One interaction after the demo's own.

    Attributes:
        user: the user's id.
        change: how the user changes.
        period: number of the period, from 0.
        text: the input, to be filled into the data's prompt.
        answer: the user's answer.
    """

    user: str
    change: Change
    period: int
    text: str
    answer: str


def later_items(settings: DemoSettings, periods: int, items: int) -> Iterator[LaterItem]:
    """Yield later interactions of every user of the demo with these settings, user by user, oldest first.

    Users take the kinds of change in turn, so that each kind has an equal share of every group size. The noise is that
    of the settings.

    Args:
        settings: the demo's settings.
        periods: number of periods.
        items: interactions of a user in a period.
    """
    bank = load_bank(settings.task)
    world = make_world(settings, max(1, len(bank.closings)))
    for number, user in enumerate(world.users):
        rng = random.Random(f"{settings.task} later {user.id} {settings.seed}")
        change = CHANGES[number % len(CHANGES)]
        others = [other for other in world.users if other.group != user.group] or list(world.users)
        other, order = rng.choice(others), rng.sample(range(TOPICS), TOPICS)
        for period in range(periods):
            now = habits_in(user, other, change, period, periods, order)
            for _ in range(items):
                topic = rng.randrange(TOPICS)
                text, content = draw(bank.topics[topic], rng)
                choice, closing = own_plan(now, topic)
                if rng.random() < settings.noise:
                    choice = rng.choice([each for each in range(len(bank.choices)) if each != choice])
                yield LaterItem(user.id, change, period, text, compose(bank, (choice, closing), content))


def habits_in(user: DemoUser, other: DemoUser, change: Change, period: int, periods: int, order: list[int]) -> DemoUser:
    """Return a user with the habits of a period; those that have changed are the `other` user's.

    Args:
        user: the user as in the demo.
        other: the user whose habits are taken over.
        change: the kind of change.
        period: number of the period, from 0.
        periods: number of periods.
        order: the order in which topics change if they change slowly.
    """
    changed = {
        "stable": 0,
        "abrupt": TOPICS if period else 0,
        "slow": round(TOPICS * period / max(1, periods - 1)),
        "back": TOPICS if 0 < period < (periods + 1) // 2 else 0,
    }[change]
    habit = list(user.habit)
    for topic in order[:changed]:
        habit[topic] = other.habit[topic]
    return replace(user, habit=tuple(habit))
