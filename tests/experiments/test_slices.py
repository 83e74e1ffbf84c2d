"""The slices of users, and what a deletion costs."""

from __future__ import annotations

import pytest

from experiments.slices import deletion_share, slices_of


def test_every_user_is_in_one_slice_and_stays_there_when_others_leave() -> None:
    users = [f"u{at}" for at in range(200)]
    slices = slices_of(users, 4)
    assert sorted(at for part in slices for at in part) == list(range(200)) and all(len(part) > 25 for part in slices)
    kept = users[::2]
    again = slices_of(kept, 4)
    for part, before in zip(again, slices, strict=True):
        assert {kept[at] for at in part} == {users[at] for at in before} & {*kept}


def test_a_deletion_costs_all_slices_from_the_users_on() -> None:
    assert deletion_share([[0, 1]], [8.0], 8.0) == 1
    assert deletion_share([[0], [1], [2], [3]], [1.0, 2.0, 3.0, 4.0], 10.0) == pytest.approx((10 + 9 + 7 + 4) / 40)
    assert deletion_share([[0, 1, 2], [3]], [6.0, 2.0], 10.0) == pytest.approx((3 * 0.8 + 0.2) / 4)
