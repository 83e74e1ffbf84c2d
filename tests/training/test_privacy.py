"""User-level DP-SGD: the step by hand, the bound per user, the noise, the accountant, and a stage that was killed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor, nn

from proper.config import Config, GroupsConfig, PrivacyConfig, make_config
from proper.data.batching import Batch, collate
from proper.data.dataset import Dataset
from proper.data.encoder import Encoder
from proper.errors import ConfigError, NonFiniteLossError
from proper.layers.batch_context import RowContext
from proper.models.checkpoints import load_tensors
from proper.models.personal import ProperModel
from proper.run_folder import RunFolder
from proper.training import privacy as dp
from proper.training.groups import GroupsStage, first_embeddings, train_groups
from proper.training.metrics_log import no_log
from proper.training.optim import rate_factor
from proper.training.stages import StageRunner
from proper.training.trainer import LossSum, TrainingPlan

Build = Callable[..., ProperModel]
MakePlan = Callable[..., TrainingPlan]
SECRET = 7


def private(**changed: Any) -> PrivacyConfig:
    noise = changed.pop("noise", 1.0)
    usual = {"noise_multiplier": 1.0, "users_per_step": 3, "rows_per_user": 2, "clip": 0.5}
    # Only tests train without noise.
    return PrivacyConfig.model_validate(usual | changed).model_copy(update={"noise_multiplier": noise})


def group_settings(**changed: Any) -> GroupsConfig:
    usual = {"user_embedding": 16, "dropout": 0.0, "epochs": 2, "constraint": {"kind": "none"}}
    return GroupsConfig.model_validate(usual | changed)


class Squares:
    """A stage of P parameters whose loss on a row is the square of a product with the row's tokens."""

    name = "groups"
    in_parts = True

    def __init__(self, size: int = 8, scale: float = 1.0) -> None:
        self.weights = nn.Parameter(torch.linspace(-1, 1, size))
        self.unused = nn.Parameter(torch.zeros(3))
        self.scale = scale
        self.seen: list[tuple[str, ...]] = []

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"weights": self.weights, "unused": self.unused}

    def loss(self, batch: Batch, progress: float) -> LossSum:
        self.seen.append(batch.users)
        features = torch.stack(
            [torch.bincount(row % len(self.weights), minlength=len(self.weights)) for row in batch.input_ids]
        )
        losses = self.scale * (features.float() @ self.weights).square()
        return LossSum(losses.sum(), torch.tensor(float(len(losses))))

    def after_backward(self, rate_factor: float) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        pass


def step_of(stage: Squares, plan: TrainingPlan, step: int = 0, users: int = 6) -> Any:
    rows = dp._rows_by_user(plan.sample)
    assert plan.privacy is not None
    return dp._step(stage, plan, plan.privacy, dp._Draws(rows, dp.UserSampling(users, 10), SECRET), step)


@pytest.mark.parametrize("kind", ["none", "experts"])
def test_a_step_without_noise_is_the_mean_of_clipped_gradients_by_hand(
    kind: str, grouped: Build, plan: MakePlan, dataset: Dataset, encoder: Encoder, accelerator: Accelerator
) -> None:
    config = group_settings(constraint={"kind": kind, "weight": 0.5, "warmup": 0}, epochs=3)
    users = [user.id for user in dataset.users()]
    # All users and all their rows are in every step, so nothing is drawn.
    everything = private(noise=0.0, users_per_step=len(users), rows_per_user=99, clip=0.02)
    model = grouped(dropout=0.0)
    found = train_groups(model, config, users, replace(plan(config), privacy=everything), accelerator)

    oracle = grouped(dropout=0.0)
    parameters = oracle.group_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3, weight_decay=config.weight_decay)
    embeddings = list(first_embeddings(config, len(users), 16, 0))
    moments = [(torch.zeros(16), torch.zeros(16)) for _ in users]
    norms = []
    for step in range(3):
        scale = rate_factor(step, 3, config.warmup, config.schedule)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for at, user in enumerate(users):
            batch = collate([encoder.encode(row) for row in dataset.history(user)], 0)
            own = embeddings[at].clone().requires_grad_()
            for p in parameters.values():
                p.requires_grad_(True)
            rows = RowContext(
                "groups",
                own.expand(len(batch.users), -1),
                users=torch.zeros(len(batch.users)).long(),
                mask=batch.attention_mask.bool(),
            )
            losses, tokens = oracle.answer_losses(batch, rows)
            objective = losses.sum() / tokens.sum()
            if kind == "experts":
                objective = objective + 0.5 * (1 - oracle.routing.stacked().square().sum(-1)).mean()
            grads = torch.autograd.grad(objective, [*parameters.values(), own])
            size = math.sqrt(sum(float(g.square().sum()) for g in grads[:-1]))
            norms.append(size)
            for name, gradient in zip(parameters, grads[:-1], strict=True):
                total[name] += gradient * min(1.0, 0.02 / size)
            first, second = moments[at]
            first.mul_(0.9).add_(0.1 * grads[-1])
            second.mul_(0.999).add_(0.001 * grads[-1] ** 2)
            spread = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            embeddings[at] = (
                embeddings[at] - config.embedding_learning_rate * scale * first / (1 - 0.9 ** (step + 1)) / spread
            )
        for name, p in parameters.items():
            p.grad = total[name] / len(users)
        optimizer.param_groups[0]["lr"] = 2e-3 * scale
        optimizer.step()
    assert min(norms) > 0.02, "every gradient is clipped"
    for name, p in model.group_parameters().items():
        expected = parameters[name].detach()
        assert float((p.detach() - expected).norm() / expected.norm()) < 1e-4, name
    assert torch.allclose(found, torch.stack(embeddings).detach(), atol=1e-4)


def test_every_user_is_drawn_by_chance_with_a_capped_number_of_rows(plan: MakePlan, dataset: Dataset) -> None:
    stage, made = Squares(), replace(plan(group_settings()), privacy=private(users_per_step=3, rows_per_user=2))
    drawn, sizes = Counter[str](), Counter[int]()
    for step in range(120):
        stage.seen.clear()
        step_of(stage, made, step)
        assert all(len(set(users)) == 1 and len(users) == 2 for users in stage.seen)
        drawn.update(users[0] for users in stage.seen)
        sizes[len(stage.seen)] += 1
    assert all(40 <= number <= 80 for number in drawn.values()) and len(drawn) == 6
    assert len(sizes) > 4, "the number of users in a step is not fixed"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=2, max_size=2),
    st.floats(1e-3, 1e3),
)
def test_what_a_user_adds_is_at_most_the_clip(values: list[list[float]], clip: float) -> None:
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    for parameter, value in zip(parameters, values, strict=False):
        parameter.grad = torch.tensor(value)
    totals = [torch.zeros(3) for _ in parameters]
    before = dp.add_clipped(totals, parameters, clip, "here")
    whole, added = torch.tensor(values).flatten().double(), torch.cat(totals).double()
    assert before == pytest.approx(float(whole.norm()), rel=1e-5)
    assert float(added.norm()) <= clip * (1 + 1e-5)
    assert torch.allclose(added[:6] * max(before, 1e-12), whole * min(before, clip), rtol=1e-4, atol=1e-6 * before)
    assert not added[6:].any()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_without_one_user_the_gradient_moves_by_at_most_the_clip(scale: float, plan: MakePlan) -> None:
    made = replace(plan(group_settings()), privacy=private(noise=0.0, users_per_step=6, rows_per_user=3))
    assert made.privacy is not None
    rows = dp._rows_by_user(made.sample)
    found = []
    for without in (None, "bob"):
        stage, own = Squares(scale=scale), {user: of for user, of in rows.items() if user != without}
        # The numbers of users stay those that the settings have: a removed user is one without rows.
        for parameter in stage.parameters().values():
            parameter.grad = None
        dp._step(
            stage,
            made,
            made.privacy,
            dp._Draws({u: of[:3] for u, of in own.items()}, dp.UserSampling(6, 10), SECRET),
            0,
        )
        assert stage.weights.grad is not None
        found.append(stage.weights.grad * 6)
    assert 0 < float((found[0] - found[1]).norm()) <= 0.5 * (1 + 1e-5)


def test_the_noise_has_the_deviation_of_the_multiplier(plan: MakePlan) -> None:
    made = replace(plan(group_settings()), privacy=private(noise=1.5, clip=0.2))
    stage = Squares(20_000, scale=0.0)
    step_of(stage, made)
    first = stage.weights.grad
    assert first is not None and float(first.std()) == pytest.approx(1.5 * 0.2 / 3, rel=0.02)
    assert abs(float(first.mean())) < 0.003
    step_of(stage, made, 1)
    assert stage.weights.grad is not None and not torch.allclose(stage.weights.grad, first)
    assert stage.unused.grad is not None and stage.unused.grad.all(), "a parameter without gradient has noise too"


def test_a_gradient_that_is_not_finite_names_the_user(plan: MakePlan) -> None:
    made = replace(plan(group_settings()), privacy=private(users_per_step=6))
    with pytest.raises(NonFiniteLossError, match="groups: the loss at step 1 is inf; users: ann"):
        step_of(Squares(scale=math.inf), made)
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([math.nan])
    with pytest.raises(NonFiniteLossError, match="here: the gradient is not finite"):
        dp.add_clipped([torch.zeros(1)], [parameter], 1.0, "here")


def test_a_killed_stage_ends_as_one_that_was_not(
    grouped: Build, plan: MakePlan, dataset: Dataset, accelerator: Accelerator
) -> None:
    config, users = group_settings(dropout=0.1, epochs=1), [user.id for user in dataset.users()]

    def trained(name: str, stop: int | None, secret: int | None) -> dict[str, Tensor]:
        model, steps = grouped(dropout=0.1), list[int]()

        def log(metrics: dict[str, Any]) -> None:
            steps.append(metrics["step"])
            if stop is not None and len(steps) == stop:
                raise KeyboardInterrupt

        made = replace(plan(config, log=log, seconds=0.0, name=name), privacy=private())
        stage = GroupsStage(model, config, users, 0, accelerator)
        for parameter in stage.parameters().values():
            parameter.requires_grad_(True)
        model.train(True)
        dp.train_privately(stage, made, accelerator, secret)
        return {**{k: p.detach().clone() for k, p in stage.parameters().items()}, "e": stage.embeddings.clone()}

    whole = trained("whole", None, SECRET)
    with pytest.raises(KeyboardInterrupt):
        trained("killed", 3, SECRET)
    # The checkpoint's secret, not the one of the new call.
    again, other = trained("killed", None, 8), trained("other", None, 8)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert not any(torch.equal(other[name], tensor) for name, tensor in whole.items())


def exact_epsilon(deviation: float, delta: float) -> float:
    """Return epsilon of the Gaussian mechanism of sensitivity 1 (Balle & Wang 2018, arXiv 1805.06530, theorem 8)."""
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        a, b = 1 / (2 * deviation), middle * deviation
        own = norm.cdf(a - b) - math.exp(middle + norm.logcdf(-a - b))
        low, high = (middle, high) if own > delta else (low, middle)
    return high


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 0), (4.0, 24), (20.0, 99), (0.3, 0)])
def test_without_sampling_epsilon_is_just_above_that_of_the_gaussian_mechanism(noise: float, steps: int) -> None:
    stages = [dp.UserSampling(3, steps)] if steps else []
    found = dp.epsilon_of(noise, private(delta=1e-5), stages)
    exact = exact_epsilon(noise / math.sqrt(steps + 1), 1e-5)
    assert exact <= found <= 1.12 * exact


def test_epsilon_falls_with_noise_and_rises_with_steps_and_sampling() -> None:
    def of(noise: float = 1.0, users: int = 300, steps: int = 50) -> float:
        return dp.epsilon_of(noise, private(users_per_step=30), [dp.UserSampling(users, steps)])

    assert of(0.5) > of(1.0) > of(2.0) > of(8.0) > 0
    assert of(steps=500) > of(steps=50) and of(users=3000) < of(users=300)


def test_the_noise_of_an_epsilon_reaches_it() -> None:
    wanted = PrivacyConfig(epsilon=4.0, users_per_step=30)
    stages = [dp.UserSampling(300, 40), dp.UserSampling(200, 60)]
    settled, epsilon = dp.with_noise(wanted, stages)
    assert settled.noise_multiplier is not None and 3.95 <= epsilon <= 4.0
    assert dp.epsilon_of(settled.noise_multiplier, wanted, stages) == epsilon
    with pytest.raises(ConfigError, match=r"privacy.epsilon: 1e-07 needs a noise multiplier above 1000"):
        dp.with_noise(PrivacyConfig(epsilon=1e-7, users_per_step=30), stages)


def test_steps_pass_over_the_rows_as_often_as_epochs_says(plan: MakePlan) -> None:
    lengths = [1, 2, 30, 7]
    found = dp._sampling(lengths, group_settings(epochs=3), private(users_per_step=2, rows_per_user=5))
    assert found == dp.UserSampling(4, math.ceil(3 * 40 / (2 * (1 + 2 + 5 + 5) / 4)))
    with pytest.raises(ConfigError, match="privacy.users_per_step: 5 is more than the 4 users with rows"):
        dp._sampling(lengths, group_settings(), private(users_per_step=5))


def test_several_processes_are_refused(plan: MakePlan) -> None:
    two = cast(Accelerator, SimpleNamespace(num_processes=2))
    with pytest.raises(ConfigError, match="trained by one process, not by 2"):
        dp.train_privately(Squares(), replace(plan(group_settings()), privacy=private()), two)


def test_the_mean_embedding_is_bounded_and_noised() -> None:
    embeddings = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    embeddings[2] *= 1e6
    bound, generator = 2.0, torch.Generator().manual_seed(1)
    found = dp.noised_mean(embeddings, private(noise=0.5), bound, generator)
    noise = torch.randn(4, generator=torch.Generator().manual_seed(1))
    total = sum((e * min(1.0, bound / float(e.norm())) for e in embeddings), torch.zeros(4))
    assert torch.allclose(found, (total + 0.5 * bound * noise) / 5, atol=1e-6)


def test_a_run_keeps_what_it_spent(settings: Config, dataset: Dataset, tmp_path: Path, caplog: Any) -> None:
    raw = settings.model_dump()
    raw |= {
        "privacy": {"epsilon": 50.0, "users_per_step": 3},
        "population": {"epochs": 1},
        "groups": {"user_embedding": 16, "epochs": 1},
    }
    config = make_config(raw)
    with caplog.at_level("INFO"):
        StageRunner(config, dataset, tmp_path, 0, no_log).run(["population", "groups"])
    run = RunFolder(tmp_path)
    facts = [json.loads(run.marker(stage).read_text()) for stage in ("population", "groups")]
    assert facts[0]["held_out_rows"] == 0 and facts[0]["privacy"] == facts[1]["privacy"]
    told = facts[0]["privacy"]
    assert 49 <= told["epsilon"] <= 50 and told["unit"] == "user" and told["noise_multiplier"] > 0
    assert sum("privacy: epsilon" in line for line in caplog.messages) == 1
    assert sum("not covered" in line for line in caplog.messages) == 1
    assert not run.encoder.exists() and not run.checkpoint("groups").exists(), "the secret is gone"
    tensors, _ = load_tensors(run.experts)
    assert tensors["mean_embedding"].shape == (16,) and tensors["mean_embedding"].isfinite().all()
