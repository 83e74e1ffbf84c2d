"""What a version knows becomes outdated: the likelihood ratio, and the update that begins anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper.enrolment.change import CLIP, EVIDENCE, change_point
from tests.enrolment.conftest import Open
from tests.enrolment.lessons import HABIT, lessons, record, with_update

MARGIN = 1e-6


def slow(ratios: list[float]) -> int | None:
    """The definition: the stretch to the end with the largest sum, the shortest of equal ones, if that is enough."""
    clipped = [min(CLIP, max(-CLIP, each)) for each in ratios]
    best, at = max(((sum(clipped[at:]), at) for at in range(len(clipped))), default=(0.0, 0))
    return at if best >= EVIDENCE else None


@given(st.lists(st.integers(-12, 12).map(lambda each: each / 4), max_size=12))
def test_the_change_is_where_the_largest_sum_to_the_end_begins(ratios: list[float]) -> None:
    unknown = torch.rand(len(ratios), dtype=torch.float64).round(decimals=2)
    found = change_point(unknown + torch.tensor(ratios, dtype=torch.float64) + MARGIN, unknown)
    assert found == slow([each + MARGIN for each in ratios])


def test_one_interaction_is_no_change() -> None:
    assert change_point(torch.tensor([0.1, 99.0]), torch.tensor([2.0, 0.0])) is None
    assert change_point(torch.tensor([0.1, 9.0, 9.0]), torch.tensor([2.0, 0.0, 0.0])) == 1


@pytest.fixture
def run(taught: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taught, tmp_path / "run"))


def test_a_user_who_has_become_another_is_fitted_anew(run: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with_update(run, past=0.0)
    model = opened(run)
    before, since = record(run, "new", 1), 18
    monkeypatch.setattr("proper.enrolment.update_user.change_point", lambda served, unknown: since - 16)
    came = [*lessons(HABIT, 15, 2), *lessons({"small": "blue", "large": "blue", "quiet": "blue"}, 17, 14)]
    head = model.users.update("new", came)
    (attempt,) = model.users.log.updates.of("", "new")
    assert head is not None and attempt.version == 2, attempt.reason
    after = record(run, "new", 2)
    assert attempt.metrics["anew"] and attempt.metrics["held_out"] == {"new": 3, "past": 0}
    assert attempt.metrics["new"] == 16 and attempt.metrics["trained"] == 11
    assert after.metadata["history"] == {"run": 0, "logged": 28, "since": since}, "what was held out is new still"
    assert after.metadata["embedding"] == "fitted" and not torch.equal(after.embedding, before.embedding)
    monkeypatch.undo()
    model.users.update("new", lessons({"small": "blue", "large": "blue", "quiet": "blue"}, 31, 5))
    attempt = model.users.log.updates.of("", "new")[0]
    assert (attempt.metrics["new"], attempt.metrics["trained"]) == (8, 6)
    assert record(run, "new").metadata["history"]["since"] == since
