"""Initial values of users' adapters other than zero (`users.start`): learnt from other users of stage 3.

    neighbours   the mean product B A of the nearest users' adapters, for users fitted after stage 3; the mean of B
                 times the mean of A is another matrix, without meaning if the users' A differ
    meta         a start from which a few steps help most users, learnt with Reptile (Nichol et al. 2018, arXiv
                 1803.02999): train users from the common start, move it toward the mean of their results, repeat

With both, an adapter contains information about other users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.store import AdapterStore
from proper.config import UsersConfig
from proper.files import private_folder
from proper.layers.bank import AdapterBank
from proper.layers.layout import Layout
from proper.models.checkpoints import load_sound_tensors, save_tensors, tensor_of
from proper.training.checkpoint import seed_of
from proper.training.jobs import Starts, fresh
from proper.training.user_stage import AdapterPhase, UserStage, fit_adapters

MAX_USERS = 128
"""Most users on whose items shared parts of stage 3 are trained, spread evenly over all."""

ROUNDS, INNER_STEPS = 3, 6
"""Rounds of Reptile, and a user's optimizer steps in each."""

ROW_NORM = 3**-0.5
"""Norm of a row of a fresh A."""


def train_start(stage: UserStage, path: Path) -> Starts:
    """Return where the stage's adapters start: `meta` reads the start from the file, or trains it and writes it."""
    if stage.config.start == "meta" and not path.exists():
        private_folder(stage.folder)
        save_tensors(path, {"start": meta_start(stage)}, {})
    return load_start(stage.config, path)


def load_start(config: UsersConfig, path: Path) -> Starts:
    """Return the start that `train_start` wrote; a fresh one unless it is `meta`, and if the file does not exist.

    Raises:
        ProperError: the file is damaged.
        StoreError: it has values that are not finite or absurdly large.
    """
    if config.start != "meta" or not path.exists():
        return fresh
    tensors, _ = load_sound_tensors(path)
    start = tensor_of(tensors, "start", path)
    return lambda user, embedding: start


def meta_start(stage: UserStage) -> Float[Tensor, "P"]:
    """Return the start learnt with Reptile on the older items of the stage's users."""
    config = stage.config.model_copy(update={"steps": INNER_STEPS})
    layout = stage.model.user_layout(config)
    start = common_start(stage)
    for number in range(ROUNDS):
        total, users = torch.zeros_like(start), 0
        for adapter in older_adapters(replace(stage, config=config), start, f"start-{number}"):
            row = torch.empty_like(start)
            layout.pack(adapter, row)
            total, users = total + row, users + 1
        if users:
            start = start + (1 - number / ROUNDS) * (total / users - start)
    return start


def common_start(stage: UserStage) -> Float[Tensor, "P"]:
    """Return a fresh adapter that depends on the run's seed only."""
    bank = AdapterBank(stage.model.user_layout(stage.config), 1, alpha=stage.config.alpha, trainable=False)
    bank.fresh(0, torch.Generator().manual_seed(seed_of(stage.seed, "common start")))
    return bank.values[0]


def older_adapters(stage: UserStage, start: Float[Tensor, "P"], name: str) -> Iterator[Mapping[str, Tensor]]:
    """Yield adapters of at most `MAX_USERS` users, trained from one start on the items that their trials train on.

    Held-out items are not used. Another call with the same name and folder reads the adapters again.
    """
    users = stage.trial_users
    spread = users[:: max(1, -(-len(users) // MAX_USERS))]
    with closing(AdapterStore(stage.folder / name)) as store:
        config = stage.config.model_copy(update={"storage": "fp32"})
        source = replace(stage, config=config, store=store, fitting=None, starts=lambda user, embedding: start)
        jobs = replace(source.jobs(spread, trial=True), measured=False)
        fit_adapters(source, AdapterPhase(name, jobs, store))
        for user in jobs.users:
            record = store.get(user)
            if record is not None and record.adapter is not None:
                yield record.adapter


def mean_adapter(adapters: Sequence[Mapping[str, Tensor]], layout: Layout) -> Float[Tensor, "P"]:
    """Return the adapter whose products are nearest to the mean of the adapters' products, in the Frobenius norm.

    Its A has orthogonal rows with the norm of a newly initialized A, so that training continues as from that.
    """
    row = torch.empty(layout.width)
    names = list(layout.stacks())
    parts = {name: [own[name].float() for own in adapters] for name in names}
    mean = {name: torch.stack(own).mean(0) for name, own in parts.items()}
    if layout.bases is None:
        for name in [name.removesuffix(".A") for name in names if name.endswith(".A")]:
            downs, ups = torch.cat(parts[f"{name}.A"], -2), torch.cat(parts[f"{name}.B"], -1) / len(adapters)
            left, right = torch.linalg.qr(ups), torch.linalg.qr(downs.mT)
            inner = torch.linalg.svd(left.R @ right.R.mT)
            rank = min(layout.rank, inner.S.shape[-1])
            up = (left.Q @ inner.U[..., :rank]) * inner.S[..., None, :rank] / ROW_NORM
            down = (inner.Vh[..., :rank, :] @ right.Q.mT) * ROW_NORM
            mean[f"{name}.A"] = _filled(down, mean[f"{name}.A"])
            mean[f"{name}.B"] = _filled(up.mT, torch.zeros_like(mean[f"{name}.B"]).mT).mT
    layout.pack(mean, row)
    return row


def _filled(rows: Float[Tensor, "L n I"], others: Float[Tensor, "L R I"]) -> Float[Tensor, "L R I"]:
    """Return rows with as many of the others as are missing."""
    return torch.cat([rows, others[:, rows.shape[1] :]], 1)
