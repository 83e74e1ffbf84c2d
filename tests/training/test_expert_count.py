"""`groups.experts: auto`: the number of clusters of users, and a run that follows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from proper.config import Config, GroupsConfig, make_config
from proper.data.dataset import Dataset
from proper.files import hash_file, read_json
from proper.inference.loading import load
from proper.layers.routers import gates_of
from proper.models.personal import ProperModel
from proper.run_folder import RunFolder
from proper.training import expert_count
from proper.training.expert_count import ExpertCount, count_experts, user_scores
from proper.training.stages import StageRunner


def clusters(number: int, spread: float, users: int = 48) -> torch.Tensor:
    """Users around so many corners of a cube, side 2, in ten of thirty dimensions."""
    draw = torch.Generator().manual_seed(number)
    corners = torch.tensor([[float(at >> bit & 1) for bit in range(4)] * 3 for at in range(number)])
    centres = torch.cat([2 * corners, torch.zeros(number, 18)], 1)
    return centres[torch.arange(users) % number] + spread * torch.randn(users, 30, generator=draw)


@pytest.mark.parametrize("number", [2, 3, 5, 8, 12])
def test_the_clusters_of_users_are_counted(number: int) -> None:
    found = count_experts(clusters(number, 0.3), most=16, default=5)
    assert found.experts == number and str(number) in found.reason
    assert max(found.silhouettes, key=lambda at: found.silhouettes[at]) == number


def test_without_clusters_or_users_it_is_the_default() -> None:
    alike = torch.randn(60, 30, generator=torch.Generator().manual_seed(0))
    found = count_experts(alike, most=16, default=5)
    assert found.experts == 5 and len(found.silhouettes) == 15 and "no number of clusters" in found.reason
    assert count_experts(torch.ones(30, 4), most=16, default=5) == ExpertCount(
        5, "1 different users are too few to count clusters; the default", {}
    )
    assert count_experts(torch.randn(5, 4), most=16, default=7).experts == 7


def test_of_numbers_that_are_as_good_it_is_the_smallest() -> None:
    """One of the three clusters has two halves: four clusters are barely better than three."""
    points = clusters(3, 0.3, users=90)
    points[::6, 20] += 1.3
    points[3::6, 20] -= 1.3
    found = count_experts(points, most=8, default=5)
    assert found.silhouettes[4] > found.silhouettes[3] and found.experts == 3


def test_no_more_than_the_most_are_found() -> None:
    assert max(count_experts(clusters(12, 0.3), most=6, default=5).silhouettes) == 6


def test_users_with_equal_scores_have_equal_gates(grouped: Callable[..., ProperModel]) -> None:
    model = grouped()
    draw = torch.Generator().manual_seed(3)
    embeddings = torch.randn(3, 16, generator=draw)
    scores = user_scores(model, embeddings)
    assert scores.shape == (3, len(model.layers) * 5)
    for at, layer in enumerate(model.layers.values()):
        assert layer.router is not None
        x = torch.randn(3, 4, layer.inputs, generator=draw)
        by_token = torch.nn.functional.linear(x, layer.router.token)
        own = scores[:, 5 * at : 5 * at + 5]
        assert torch.allclose(
            gates_of(layer.router.scores(x, embeddings)), (by_token + own[:, None]).softmax(-1), atol=1e-5
        )


class Stopped(Exception):
    """What a test throws into a run."""


@pytest.fixture
def auto(settings: Config, dataset: Dataset, tmp_path: Path) -> Callable[..., StageRunner]:
    """`auto(name, experts)` returns a runner of a run of its own, with checkpoints after every step."""

    def build(name: str, experts: int | str = "auto") -> StageRunner:
        raw = settings.model_dump()
        raw["population"] |= {"epochs": 0.3}
        raw["groups"] |= {"epochs": 1, "batch_size": 8, "experts": experts, "user_encoder": False}
        raw["compute"] |= {"checkpoint_seconds": 1e-9}
        raw["users"] |= {"steps": 1}
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        return StageRunner(make_config(raw), dataset, tmp_path / name, 0, [].append)

    return build


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Let six users be enough to find three experts; return the scores they were found by."""
    seen: list[torch.Tensor] = []

    def count(scores: torch.Tensor, most: int, default: int) -> ExpertCount:
        seen.append(scores)
        return ExpertCount(3, "the test says so", {3: 1.0})

    monkeypatch.setattr(expert_count, "count_experts", count)
    return seen


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop stage 2 at its n-th step, whichever training it belongs to."""
    from proper.training.groups import GroupsStage

    left, step = iter(range(steps)), GroupsStage.after_backward

    def watched(self: GroupsStage, *given: Any) -> None:
        if next(left, None) is None:
            raise Stopped
        step(self, *given)

    monkeypatch.setattr(GroupsStage, "after_backward", watched)


def test_a_run_with_auto_is_the_run_with_the_number_found(
    auto: Callable[..., StageRunner], three: list[torch.Tensor], tmp_path: Path
) -> None:
    auto("found").run(["population", "groups", "users"])
    auto("fixed", 3).run(["population", "groups"])
    found, fixed = RunFolder(tmp_path / "found"), RunFolder(tmp_path / "fixed")
    assert hash_file(found.experts) == hash_file(fixed.experts)
    assert read_json(found.found_experts) == {"experts": 3, "reason": "the test says so", "silhouettes": {"3": 1.0}}
    assert read_json(found.marker("groups"))["experts"] == 3 and not found.finding_experts.exists()
    assert three[0].shape[1] % 16 == 0 and len(three) == 1, "the first training has 16 experts"
    served = load(found.path)
    assert served.config.groups.experts == 3
    assert all(layer.router is not None and len(layer.router.token) == 3 for layer in served.model.layers.values())


@pytest.mark.parametrize("steps", [2, 9])
def test_a_killed_run_finds_the_same_number(
    auto: Callable[..., StageRunner], three: list[torch.Tensor], tmp_path: Path, steps: int
) -> None:
    auto("whole").run(["population", "groups"])
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        stop_after(steps, patched)
        auto("killed").run(["population", "groups"])
    killed = RunFolder(tmp_path / "killed")
    assert killed.found_experts.exists() == (steps == 9), "once in the first training, once after it"
    auto("killed").run(["population", "groups"])
    assert hash_file(killed.experts) == hash_file(RunFolder(tmp_path / "whole").experts)
    assert len(three) == 2 and torch.equal(three[0], three[1])


def test_tasks_with_experts_of_their_own_need_a_number() -> None:
    with pytest.raises(ValidationError, match="needs a number in `experts`"):
        GroupsConfig.model_validate({"experts": "auto", "task_experts": "separate"})
