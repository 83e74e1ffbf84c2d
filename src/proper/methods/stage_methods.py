"""Methods that train and answer with the run's own three stages: the stages themselves, controls, and exported forms.

Training: the stages as in the main run, or with all rows attributed to one user. Inference: each user with their own
model, with another user's, all as one user, or from exported or int8 adapters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from proper.data.derived.views import OneUser
from proper.evaluation.runner import MethodRun, predict
from proper.export.converted_models import STATIC_EXPORT, USERS_INT8, in_int8, static_export
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel, ServedUsers
from proper.methods.spec import TrainedRun, TrainingWork
from proper.models.personal import ProperModel
from proper.run_folder import Tier
from proper.training.checkpoint import seed_of
from proper.training.stages import StageRunner

Answer = Callable[[TrainedRun], MethodRun]


def train_stages(work: TrainingWork) -> None:
    """Train the stages as the main run does."""
    run = work.run
    StageRunner(run.config, run.dataset, run.folder, run.seed, work.log).run(work.stages)


def train_one_user(work: TrainingWork) -> None:
    """Train the stages with all rows attributed to one user: the same rows in the same order, one embedding."""
    run = work.run
    StageRunner(run.config, OneUser(run.dataset), run.folder, run.seed, work.log).run(work.stages)


def as_itself(tier: Tier) -> Answer:
    """Answer every query with the model of `tier`, as its own user."""

    def answer(run: TrainedRun) -> MethodRun:
        return _answer(run, tier, lambda user: user)

    return answer


def as_another(run: TrainedRun) -> MethodRun:
    """Answer every user with the embedding and the adapter of another user (control `swapped`)."""
    others = derangement([user.id for user in run.dataset.users("target")], run.seed)
    return _answer(run, Tier.USERS, lambda user: others[user])


def as_one(tier: Tier, user: str) -> Answer:
    """Answer every query as `user`."""

    def answer(run: TrainedRun) -> MethodRun:
        return _answer(run, tier, lambda _: user)

    return answer


def exported(run: TrainedRun) -> MethodRun:
    """Answer every user from the plain LoRA that `proper users export --format peft` would write."""
    with static_export(run.folder, run.dataset) as model:
        return predict(model, run.dataset, run.config.task, f"{STATIC_EXPORT}, {run.folder.name}")


def in_eight_bits(run: TrainedRun) -> MethodRun:
    """Answer every user with their adapter quantized as with `users.storage: int8`."""
    users = [user.id for user in run.dataset.users("target")]
    with in_int8(run.folder, users) as model:
        return predict(model, run.dataset, run.config.task, f"{USERS_INT8}, {run.folder.name}")


def answer_with(run: TrainedRun, model: ProperModel, users: ServedUsers) -> MethodRun:
    """Answer every query with a model that another trainer made, and its users, and close their store."""
    encoder = model.backbone.encoder()
    personalized = PersonalizedModel(model, encoder, run.config, users, Tier.USERS)
    try:
        return predict(personalized, run.dataset, run.config.task, run.folder.name)
    finally:
        personalized.close()


def derangement(users: Sequence[str], seed: int) -> Mapping[str, str]:
    """Return a seeded derangement of at least two users, as one cycle: every user maps to another, each used once."""
    order = sorted(users)
    random.Random(seed_of(seed, "derangement")).shuffle(order)
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _answer(run: TrainedRun, tier: Tier, alias: Callable[[str], str]) -> MethodRun:
    model = load(run.folder, tier)
    try:
        return predict(model, run.dataset, run.config.task, f"{tier}, {run.folder.name}", alias)
    finally:
        model.close()
