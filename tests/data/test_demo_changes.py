"""Demo users who change: what the planted habits are in each period, and that nothing else changes."""

from __future__ import annotations

import pytest

from proper.data.demo.banks import load_bank
from proper.data.demo.changes import CHANGES, Change, habits_in, later_items
from proper.data.demo.users import TOPICS, DemoSettings, DemoUser, make_world

OWN = DemoUser("u1", 0, tuple(range(TOPICS)), 0)
OTHER = DemoUser("u2", 1, tuple(100 + at for at in range(TOPICS)), 0)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("stable", [0, 0, 0, 0, 0, 0]),
        ("abrupt", [0, 7, 7, 7, 7, 7]),
        ("slow", [0, 1, 3, 4, 6, 7]),
        ("back", [0, 7, 7, 0, 0, 0]),
    ],
)
def test_how_many_topics_have_changed(change: Change, changed: list[int]) -> None:
    order = [6, 0, 1, 2, 3, 4, 5]
    for period, count in enumerate(changed):
        now = habits_in(OWN, OTHER, change, period, 6, order)
        taken = {topic for topic in range(TOPICS) if now.habit[topic] >= 100}
        assert taken == set(order[:count]) and (now.id, now.closing) == ("u1", 0)


def test_later_items_follow_the_demo_s_users() -> None:
    settings = DemoSettings(users=8, groups=4, noise=0)
    items = list(later_items(settings, 3, 4))
    assert items == list(later_items(settings, 3, 4))
    users = {user.id: user for user in make_world(settings, 1).users}
    assert len(items) == 8 * 3 * 4 and {item.user for item in items} == set(users)
    assert [len({item.user for item in items if item.change == change}) for change in CHANGES] == [2, 2, 2, 2]
    bank = load_bank("classification")
    for item in items:
        if item.change == "stable" or item.period == 0:
            assert item.answer.split()[-1] in {bank.choices[choice] for choice in users[item.user].habit}
