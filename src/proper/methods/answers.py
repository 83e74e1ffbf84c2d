"""Inference of a trained run: unchanged, with users swapped, as one user for all, or from exported or int8 adapters."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch

from proper.adapters.store import AdapterStore
from proper.errors import DataError
from proper.evaluation.runner import MethodRun, predict
from proper.export.int8_model import USERS_INT8, in_int8
from proper.export.static_model import STATIC_EXPORT, static_export
from proper.inference.loading import load, serve_users
from proper.inference.model import PersonalizedModel, ServedUsers
from proper.layers.bank import AdapterBank
from proper.methods.per_user_lora import direct_model
from proper.methods.spec import TrainedRun
from proper.models.backbone import configured_backbone
from proper.models.personal import ProperModel
from proper.run_folder import RunFolder, Tier
from proper.training.checkpoint import seed_of

Answer = Callable[[TrainedRun], MethodRun]


def as_itself(tier: Tier) -> Answer:
    """Answer every query with the model of `tier`, as its own user."""

    def answer(place: TrainedRun) -> MethodRun:
        return _answers(place, tier, lambda user: user)

    return answer


def as_another(place: TrainedRun) -> MethodRun:
    """Answer every user with the embedding and the adapter of another (control `swapped`)."""
    others = derangement([user.id for user in place.dataset.users("target")], place.seed)
    return _answers(place, Tier.USERS, lambda user: others[user])


def as_one(tier: Tier, user: str) -> Answer:
    """Answer every query as `user`."""

    def answer(place: TrainedRun) -> MethodRun:
        return _answers(place, tier, lambda _: user)

    return answer


def exported(place: TrainedRun) -> MethodRun:
    """Answer every user from the plain LoRA that `proper users export --format peft` would write."""
    with static_export(place.folder, place.dataset) as model:
        return predict(model, place.dataset, place.config.task, f"{STATIC_EXPORT}, {place.folder.name}")


def in_eight_bits(place: TrainedRun) -> MethodRun:
    """Answer every user with their adapter quantized as with `users.storage: int8`."""
    users = [user.id for user in place.dataset.users("target")]
    with in_int8(place.folder, users) as model:
        return predict(model, place.dataset, place.config.task, f"{USERS_INT8}, {place.folder.name}")


def directly(place: TrainedRun) -> MethodRun:
    """Answer with user adapters directly on the backbone or on population (`DirectRunner`)."""
    model, users = direct_model(place.config, place.folder), place.config.users
    slots = max(2, place.config.compute.batch_size)
    bank = AdapterBank(model.layout(users.rank), slots, alpha=users.alpha, trainable=False, device=model.device)
    model.use_bank(bank)
    served = ServedUsers(AdapterStore(RunFolder(place.folder).users.path), bank, torch.zeros(1))
    return _run(place, model, served)


def jointly(place: TrainedRun) -> MethodRun:
    """Answer with experts and adapters that were trained jointly on the bare backbone (`JointRunner`)."""
    config = place.config
    backbone = configured_backbone(config)
    model = ProperModel(backbone)
    return _run(place, model, serve_users(place.folder, config, model))


def _run(place: TrainedRun, model: ProperModel, served: ServedUsers) -> MethodRun:
    encoder = model.backbone.encoder(place.config.compute.max_length)
    whole = PersonalizedModel(model, encoder, place.config, served, Tier.USERS)
    try:
        return predict(whole, place.dataset, place.config.task, place.folder.name)
    finally:
        whole.close()


def derangement(users: Sequence[str], seed: int) -> Mapping[str, str]:
    """Return a seeded derangement of the users, as one cycle: every user maps to another user, each used once.

    Raises:
        DataError: there is only one user.
    """
    if len(users) < 2:
        raise DataError("method 'swapped' needs two target users: one has nobody to be swapped with")
    order = sorted(users)
    random.Random(seed_of(seed, "derangement")).shuffle(order)
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _answers(place: TrainedRun, tier: Tier, alias: Callable[[str], str]) -> MethodRun:
    model = load(place.folder, tier)
    try:
        return predict(model, place.dataset, place.config.task, f"{tier}, {place.folder.name}", alias)
    finally:
        model.close()
