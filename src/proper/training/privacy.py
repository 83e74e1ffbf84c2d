"""User-level DP-SGD of stages 1 and 2: one clipped gradient per user, and noise on their sum.

After Abadi et al. 2016 (arXiv 1607.00133), with users as unit as in McMahan et al. 2018 (arXiv 1710.06963).

    step:  draw every user with probability q = users_per_step / users, independently (Poisson sampling)
           g_u = gradient of the shared parameters by the mean loss per answer token of some rows of user u
           g   = (sum_u g_u min(1, clip / |g_u|) + noise_multiplier clip N(0, I)) / users_per_step,  then AdamW on g

A user changes the sum by at most `clip`, for any rows. An embedding e_u belongs to one user, so it is updated without
noise: it influences other users only through g and through the mean embedding, which is noised too. The guarantee
covers the shared parameters, for a user whose rows are removed while the numbers of users and steps are unchanged.

The draw of users, dropout and noise come from a secret that is drawn for each run and kept only in its checkpoint,
because with the secret the noise could be subtracted. A resumed stage draws the same numbers.
"""

from __future__ import annotations

import math
import random
import secrets
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from jaxtyping import Float
from torch import Tensor, nn

from proper.config import OptimizerConfig, PrivacyConfig
from proper.console import progress
from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.data.histories import SampledRows, TextExample
from proper.errors import ConfigError, NonFiniteLossError
from proper.extras import needs_extra
from proper.training.checkpoint import adamw_tensors, resume_adamw, seed_of
from proper.training.optim import rate_factor
from proper.training.trainer import TrainableStage, TrainingPlan, parts_of, require_finite

ORDERS = [*(1 + x / 100 for x in (1, 5, 10, 20, 30, 50, 75)), *range(2, 64), 128, 256]
"""Renyi orders of the accountant: small ones are the best for large epsilons. Those that are not whole are slow."""

MIN_NOISE, MAX_NOISE = 0.05, 1000
"""Smallest and largest noise multiplier that is tried for an epsilon."""

NOISE_PRECISION = 1.004
"""Ratio of two noise multipliers at which the search between them ends; the larger one is taken."""


@dataclass(frozen=True)
class UserSampling:
    """Users of a stage who have rows, and its optimizer steps."""

    users: int
    steps: int


def sampling_of(sample: SampledRows, config: OptimizerConfig, privacy: PrivacyConfig) -> UserSampling:
    """Return the users and steps of a stage: on average, `epochs` passes over its rows.

    Raises:
        ConfigError: there are fewer users than `privacy.users_per_step`.
    """
    return _sampling([len(rows) for rows in _rows_by_user(sample).values()], config, privacy)


def _sampling(lengths: Sequence[int], config: OptimizerConfig, privacy: PrivacyConfig) -> UserSampling:
    users = len(lengths)
    if privacy.users_per_step > users:
        raise ConfigError(
            f"privacy.users_per_step: {privacy.users_per_step} is more than the {users} users with rows; set it to "
            f"{users} or less"
        )
    rows_per_step = privacy.users_per_step * sum(min(rows, privacy.rows_per_user) for rows in lengths) / users
    return UserSampling(users, max(1, math.ceil(config.epochs * sum(lengths) / rows_per_step)))


def with_noise(privacy: PrivacyConfig, stages: Sequence[UserSampling]) -> tuple[PrivacyConfig, float]:
    """Return the settings with the noise multiplier of these stages and the mean embedding, and their epsilon.

    Raises:
        ConfigError: no noise reaches the epsilon.
        MissingExtraError: the accountant is not installed.
    """
    if privacy.epsilon is None:
        assert privacy.noise_multiplier is not None
        return privacy, epsilon_of(privacy.noise_multiplier, privacy, stages)
    low, high = MIN_NOISE, 2 * MIN_NOISE
    while epsilon_of(high, privacy, stages) > privacy.epsilon:
        low, high = high, 2 * high
        if high > MAX_NOISE:
            raise ConfigError(
                f"privacy.epsilon: {privacy.epsilon:g} needs a noise multiplier above {MAX_NOISE:g}; raise epsilon"
            )
    while high / low > NOISE_PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon_of(middle, privacy, stages) <= privacy.epsilon else (middle, high)
    found = privacy.model_copy(update={"noise_multiplier": high})
    return found, epsilon_of(high, privacy, stages)


def epsilon_of(noise_multiplier: float, privacy: PrivacyConfig, stages: Sequence[UserSampling]) -> float:
    """Return the epsilon at `privacy.delta` of all stages and one release of the mean embedding, by Renyi accounting.

    Raises:
        MissingExtraError: the accountant is not installed.
    """
    with needs_extra("privacy", "privacy (differentially private training)"):
        from opacus.accountants.analysis import rdp
    parts = [(privacy.users_per_step / stage.users, stage.steps) for stage in stages] + [(1.0, 1)]
    spent = sum(rdp.compute_rdp(q=q, noise_multiplier=noise_multiplier, steps=n, orders=ORDERS) for q, n in parts)
    with warnings.catch_warnings():
        # If the best order is the first or last one, epsilon is a bound still, though not the least.
        warnings.simplefilter("ignore", UserWarning)
        epsilon, _ = rdp.get_privacy_spent(orders=ORDERS, rdp=spent, delta=privacy.delta)
    return max(0.0, float(epsilon))


def noised_mean(
    embeddings: Float[Tensor, "U D"], privacy: PrivacyConfig, bound: float, generator: torch.Generator
) -> Float[Tensor, "D"]:
    """Return the mean of the users' embeddings, each scaled down to a norm of `bound` at most, noise added."""
    assert privacy.noise_multiplier is not None
    norms = embeddings.norm(dim=1, keepdim=True).clamp(min=1e-12)
    total: Tensor = (embeddings * (bound / norms).clamp(max=1)).sum(0)
    noise = torch.randn(total.shape, generator=generator)
    return total.add(noise, alpha=privacy.noise_multiplier * bound) / len(embeddings)


def secret_generator() -> torch.Generator:
    """Return a generator with a random seed that is not kept."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def train_privately(
    stage: TrainableStage, plan: TrainingPlan, accelerator: Accelerator, secret: int | None = None
) -> None:
    """Train a stage to its end with `plan.privacy`, resuming from its checkpoint if there is one.

    The rows of all users are kept in memory.

    Args:
        stage: what is trained.
        plan: data and settings; the noise multiplier is set.
        accelerator: one process.
        secret: what sampling and noise are drawn from; None: a random one. A checkpoint's own comes first.

    Raises:
        ConfigError: there are several processes, or too few users.
        NonFiniteLossError: a user's loss or gradient is not finite.
    """
    assert plan.privacy is not None
    _require_one_process(accelerator)
    rows_of = _rows_by_user(plan.sample)
    sampling = _sampling([len(rows) for rows in rows_of.values()], plan.config, plan.privacy)
    parameters = stage.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=plan.rate, weight_decay=plan.config.weight_decay)
    done, tensors = resume_adamw(plan.checkpoint, optimizer, parameters)
    if tensors:
        stage.restore(tensors)
        secret = (plan.checkpoint.metadata() or {})["secret"]
    secret = secrets.randbits(63) if secret is None else secret
    draws = _Draws(rows_of, sampling, secret)
    with progress(f"{stage.name} (seed {plan.seed})", sampling.steps) as advance:
        advance(done)
        for step in range(done, sampling.steps):
            started = time.perf_counter()
            scale = rate_factor(step, sampling.steps, plan.config.warmup, plan.config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * scale
            metrics = _step(stage, plan, plan.privacy, draws, step)
            optimizer.step()
            stage.after_backward(scale)
            if metrics is not None:
                metrics |= {"learning_rate": plan.rate * scale, "seconds": round(time.perf_counter() - started, 4)}
                plan.log(metrics)
            advance(1, "" if metrics is None else f"loss {metrics['loss']:.3f}")
            if plan.checkpoint.due():
                state = {**adamw_tensors(optimizer, parameters), **stage.state()}
                plan.checkpoint.save(state, {"step": step + 1, "secret": secret})


def _require_one_process(accelerator: Accelerator) -> None:
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"privacy: stages 1 and 2 are trained by one process, not by {accelerator.num_processes}; "
            "run without accelerate launch and --cluster"
        )


@dataclass(frozen=True)
class _Draws:
    """What steps are drawn from: every user's rows, the sampling, and the secret that seeds all random numbers."""

    rows_of: Mapping[str, Sequence[TextExample]]
    sampling: UserSampling
    secret: int


def _step(
    stage: TrainableStage, plan: TrainingPlan, privacy: PrivacyConfig, draws: _Draws, step: int
) -> dict[str, Any] | None:
    """Set the parameters' gradients to those of one step; return its metrics, or None if no user was drawn."""
    assert privacy.noise_multiplier is not None
    rows_of, sampling, secret = draws.rows_of, draws.sampling, draws.secret
    parameters = list(stage.parameters().values())
    draw = random.Random(seed_of(secret, stage.name, step))
    sampled = [user for user in rows_of if draw.random() < privacy.users_per_step / sampling.users]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    losses, tokens = 0.0, 0
    for user in sampled:
        rows = draw.sample(rows_of[user], min(privacy.rows_per_user, len(rows_of[user])))
        encoded = [plan.encoder.encode(row) for row in rows]
        set_seed(seed_of(secret, stage.name, step, user) % 2**32)
        loss, count = _user_gradient(stage, plan, encoded, step, sampling.steps, parameters)
        add_clipped(totals, parameters, privacy.clip, f"{stage.name}: step {step + 1}: user {user}")
        losses, tokens = losses + loss, tokens + count
    noise = torch.Generator().manual_seed(seed_of(secret, stage.name, step, "noise"))
    deviation = privacy.noise_multiplier * privacy.clip
    for parameter, total in zip(parameters, totals, strict=True):
        drawn = torch.randn(parameter.shape, generator=noise).to(parameter.device)
        parameter.grad = (total + deviation * drawn) / privacy.users_per_step
    if not sampled:
        return None
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
    return {
        "stage": stage.name,
        "seed": plan.seed,
        "step": step + 1,
        "epoch": round(plan.config.epochs * (step + 1) / sampling.steps, 4),
        "loss": round(losses / len(sampled), 6),
        "gradient_norm": round(norm, 6),
        "tokens": tokens,
        "users": len(sampled),
    }


def _user_gradient(
    stage: TrainableStage,
    plan: TrainingPlan,
    rows: Sequence[EncodedExample],
    step: int,
    steps: int,
    parameters: Sequence[nn.Parameter],
) -> tuple[float, int]:
    """Set the parameters' gradients to those of one user's rows; return the loss per answer token and the tokens."""
    for parameter in parameters:
        parameter.grad = None
    answers, total, tokens = sum(row.answers for row in rows), 0.0, 0
    for part in parts_of(rows, plan.batch_tokens) if stage.in_parts else [rows]:
        batch = collate(part, plan.pad, parameters[0].device)
        loss = stage.loss(batch, step / steps)
        objective = loss.objective(answers)
        require_finite(objective, stage.name, step, part)
        torch.autograd.backward(objective)
        total += float(loss.total.detach())
        tokens += batch.tokens
    return total / answers, tokens


def add_clipped(totals: Sequence[Tensor], parameters: Sequence[nn.Parameter], clip: float, where: str) -> float:
    """Add the parameters' gradients to `totals`, scaled down together to a norm of at most `clip`; return their norm.

    Raises:
        NonFiniteLossError: a gradient is not finite; begins with `where`.
    """
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))
    if not math.isfinite(norm):
        raise NonFiniteLossError(f"{where}: the gradient is not finite")
    for total, parameter in zip(totals, parameters, strict=True):
        if parameter.grad is not None:
            total.add_(parameter.grad, alpha=min(1.0, clip / max(norm, 1e-12)))
    return norm


def _rows_by_user(sample: SampledRows) -> dict[str, list[TextExample]]:
    """Return the rows of every user, both in an order that does not depend on the run's seed."""
    found: dict[str, list[TextExample]] = {}
    for row in sorted(sample.rows(0), key=lambda row: row.id):
        found.setdefault(row.user, []).append(row)
    return found
