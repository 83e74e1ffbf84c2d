"""Stage 2: whose embeddings move, where they move to, and what the constraint does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from proper.config import GroupsConfig, UsersConfig
from proper.data.batching import collate
from proper.data.dataset import Dataset
from proper.data.encoder import EncodedExample
from proper.layers.batch_context import RowContext
from proper.models.answer_loss import answer_loss
from proper.models.personal import ProperModel
from proper.training.groups import GroupsStage, train_groups
from proper.training.trainer import TrainingPlan

Build = Callable[..., ProperModel]

USERS = ["ann", "bob", "çem", "dan", "eve"]


def rows_of(*users: str) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(11)
    made = []
    for at, user in enumerate(users):
        ids = torch.randint(3, 60, (6 + 3 * at,), generator=generator)
        made.append(EncodedExample(user, tuple(ids.tolist()), 4))
    return made


def stage_of(model: ProperModel, accelerator: Accelerator, **constraint: Any) -> GroupsStage:
    config = GroupsConfig.model_validate(
        {"user_embedding": 16, "constraint": {"weight": 1.0, "warmup": 0.0} | constraint}
    )
    for parameter in model.group_parameters().values():
        parameter.requires_grad_(True)
    return GroupsStage(model, config, USERS, 0, accelerator)


@pytest.mark.parametrize(("options", "spread"), [({}, 1.0), ({"embedding_init": 0.02}, 0.02)])
def test_embeddings_start_with_the_configured_spread(
    grouped: Build, accelerator: Accelerator, options: dict[str, float], spread: float
) -> None:
    stage = GroupsStage(grouped(), GroupsConfig.model_validate(options), [str(n) for n in range(400)], 0, accelerator)
    assert stage.embeddings.dtype == torch.float32 and abs(float(stage.embeddings.mean())) < 0.05 * spread
    assert float(stage.embeddings.std()) == pytest.approx(spread, rel=0.05)


def test_absent_users_do_not_move(grouped: Build, accelerator: Accelerator) -> None:
    stage = stage_of(grouped(), accelerator)
    batches = [rows_of(*USERS), rows_of("bob", "dan", "bob"), rows_of("dan")]
    for number, rows in enumerate(batches):
        before = [t.clone() for t in (stage.embeddings, *stage.optimizer.tensors().values())]
        loss = stage.loss(collate(rows, pad=0), 0.5)
        penalty = loss.penalty if loss.penalty is not None else 0
        (loss.total / loss.tokens + penalty).backward()
        stage.after_backward(1.0)
        present = sorted({USERS.index(row.user) for row in rows})
        absent = [user for user in range(5) if user not in present]
        now = (stage.embeddings, *stage.optimizer.tensors().values())
        for old, new in zip(before, now, strict=True):
            assert torch.equal(old[absent], new[absent])
        assert all(not torch.equal(before[0][user], stage.embeddings[user]) for user in present), number
    assert stage.optimizer.steps.tolist() == [1, 2, 1, 3, 1]


def test_an_embeddings_gradient_is_summed_over_its_rows_and_micro_batches(
    grouped: Build, accelerator: Accelerator
) -> None:
    model = grouped()
    stage = stage_of(model, accelerator, kind="none")
    start = stage.embeddings.clone()
    batches = [rows_of("bob", "dan", "bob"), rows_of("dan", "ann")]
    for rows in batches:
        loss = stage.loss(collate(rows, pad=0), 0.0)
        (loss.total / 17).backward()
    captured: dict[str, Any] = {}
    step = stage.optimizer.step
    stage.optimizer.step = lambda *given: captured.update(given=given) or step(*given)  # type: ignore[method-assign, func-returns-value]
    stage.after_backward(0.5)

    values, index, gradients, rate = captured["given"]
    assert index.tolist() == [0, 1, 3] and rate == 0.5 * stage.config.embedding_learning_rate
    for row, user in zip(gradients, index.tolist(), strict=True):
        own = start[user].clone().requires_grad_()
        total = torch.zeros(())
        for rows in batches:
            for encoded in rows:
                if USERS.index(encoded.user) == user:
                    batch = collate([encoded], pad=0)
                    logits = model.answer_logits(batch, RowContext("groups", embedding=own.unsqueeze(0)))
                    total = total + answer_loss(logits, batch.labels)[0].sum() / 17
        expected = torch.autograd.grad(total, own)[0]
        assert torch.allclose(row, expected, rtol=1e-3, atol=1e-6), USERS[user]
    assert values is stage.embeddings


def mean_cosine(stage: GroupsStage, rows: list[EncodedExample]) -> float:
    """Mean over modules and pairs of users of the cosine of their mean gates, by loops."""
    batch = collate(rows, pad=0)
    with torch.no_grad():
        stage.loss(batch, 1.0)
    found = []
    for gates in stage.model.routing.gates.values():
        for one, other in combinations(gates, 2):
            found.append(float(one @ other / (one.norm() * other.norm())))
    stage._pending.clear()
    return sum(found) / len(found)


@pytest.mark.parametrize("kind", ["users", "experts", "released"])
def test_the_constraint_alone_moves_routers_apart(grouped: Build, accelerator: Accelerator, kind: str) -> None:
    model = grouped()
    stage = stage_of(model, accelerator, kind=kind)
    parameters = list(stage.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    rows = rows_of(*USERS)
    before = mean_cosine(stage, rows)
    first: list[Tensor] = [p.detach().clone() for p in parameters]

    for _ in range(5):
        optimizer.zero_grad()
        loss = stage.loss(collate(rows, pad=0), 1.0)
        assert loss.penalty is not None and loss.penalty.requires_grad == (kind != "released")
        (0 * loss.total + loss.penalty).backward()
        optimizer.step()
        stage.after_backward(1.0)

    after = mean_cosine(stage, rows)
    if kind == "released":
        assert after == before and all(torch.equal(a, b) for a, b in zip(first, parameters, strict=True))
    elif kind == "users":
        assert after < before - 0.05
    else:
        assert after != before, "it sharpens every user's mixture, towards whichever expert"


def test_the_constraint_is_warmed_up_weighted_and_the_mean_over_modules(
    grouped: Build, accelerator: Accelerator
) -> None:
    stage = stage_of(grouped(), accelerator, kind="users", weight=0.3, warmup=0.1)
    batch = collate(rows_of(*USERS), pad=0)

    def penalty(progress: float) -> float:
        found = stage.loss(batch, progress).penalty
        assert found is not None
        return float(found.detach())

    cosine = mean_cosine(stage, rows_of(*USERS))
    assert penalty(0.0) == 0
    assert penalty(0.05) == pytest.approx(0.15 * cosine, rel=1e-4)
    assert penalty(0.1) == penalty(0.9) == pytest.approx(0.3 * cosine, rel=1e-4)
    alone = stage.loss(collate(rows_of("ann", "ann"), pad=0), 1.0).penalty
    assert alone is not None and float(alone) == 0
    assert stage_of(grouped(), accelerator, kind="none").loss(batch, 1.0).penalty is None


def test_gates_of_padding_do_not_count(grouped: Build, accelerator: Accelerator) -> None:
    stage = stage_of(grouped(), accelerator)
    rows = rows_of(*USERS)
    stage.loss(collate(rows, pad=0), 1.0)
    together = {name: gates.detach() for name, gates in stage.model.routing.gates.items()}
    for number, row in enumerate(rows):
        stage.loss(collate([row], pad=0), 1.0)
        for name, gates in stage.model.routing.gates.items():
            assert torch.allclose(gates[0], together[name][number], atol=1e-5)


def test_only_what_belongs_to_stage_2_is_trained(
    grouped: Build, dataset: Dataset, plan: Callable[..., TrainingPlan], accelerator: Accelerator
) -> None:
    model, config = grouped(), GroupsConfig(user_embedding=16, epochs=1)
    model.add_lora_router(UsersConfig())
    mine = {id(p) for p in model.group_parameters().values()}
    before = {n: p.detach().clone() for n, p in model.backbone.model.named_parameters() if id(p) not in mine}
    moved = {name: p.detach().clone() for name, p in model.group_parameters().items()}
    users = [user.id for user in dataset.users()]

    embeddings = train_groups(model, config, users, plan(config), accelerator)

    assert embeddings.shape == (len(users), 16) and not embeddings.requires_grad
    for name, parameter in model.backbone.model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name]), name
    assert all(not torch.equal(p, moved[name]) for name, p in model.group_parameters().items())
    assert not any(p.requires_grad for p in model.group_parameters().values())
    assert not any(layer.experts.training for layer in model.layers.values() if layer.experts is not None)


def test_the_released_preset_trains(
    grouped: Build, dataset: Dataset, plan: Callable[..., TrainingPlan], accelerator: Accelerator
) -> None:
    config = GroupsConfig.model_validate(
        {"router": "released", "embedding": "per-module", "constraint": {"kind": "released"}, "epochs": 1}
    )
    model = grouped(router="released", embedding="per-module")
    log: list[dict[str, Any]] = []
    users = [user.id for user in dataset.users()]
    embeddings = train_groups(model, config, users, plan(config, log=log), accelerator)
    assert embeddings.shape == (len(users), model.embedding_size) == (6, 224)
    assert log[-1]["penalty"] > 0
