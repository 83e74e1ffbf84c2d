"""Stage 3 training: a LoRA adapter per user who gains from one, then the LoRA-aware router (method: stage 3, tiers).

    1. trials   every user's adapter on the older part of the history; one choice of passes and scale for all; the
                users who gain from an adapter (`trials`)
    2. final    the adapters of these users, on all their items, for the chosen passes and at the chosen scale (3a)
    3. router   3b, if the config has a LoRA-aware router: on the final adapters, or in the trials on their held-out
                items

A restart goes on behind the last part that is finished (`user_stage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from proper.adapters.store import AdapterStore, UserRecord
from proper.console import Bar
from proper.files import private_folder, write_json
from proper.run_folder import Tier
from proper.training.jobs import FitResult, Job
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.pooled_choice import ALL_PASSES, Choice
from proper.training.tier_selection import storable
from proper.training.trials import select
from proper.training.user_stage import (
    AdapterPhase,
    Metadata,
    UserStage,
    fit_adapters,
    fit_marker,
    fit_router,
    fitted,
    no_metadata,
    record_of,
)

_KEPT = "kept.json"
"""Marker: the records of users without an adapter are written, after all adapters."""

RECORDS = 1000
"""Number of records per put for users who were not trained."""


@dataclass(frozen=True)
class TrainedUsers:
    """Result of stage 3 beside the store: the LoRA-aware routers' parameters, and the passes and scale of all users."""

    router: dict[str, nn.Parameter]
    choice: Choice


def train_users(stage: UserStage) -> TrainedUsers:
    """Run stage 3 and write every user's record to the store."""
    private_folder(stage.folder)
    if stage.config.tiers.select:
        chosen, choice, metadata = select(stage)
    else:
        chosen, choice, metadata = list(range(len(stage.users))), ALL_PASSES, no_metadata
    jobs = stage.jobs(chosen, trial=False, part=choice.part)
    fit_adapters(stage, AdapterPhase("final", jobs, stage.store, metadata, choice.scale))
    _keep_on_group_tier(stage, chosen, metadata)
    # A router of the trials' held-out items is loaded: it must not see the items of the final adapters' fit.
    phase = "trial" if stage.config.router_on_held_out else "final"
    fit_router(stage, stage.jobs(fitted(stage, chosen, stage.store), trial=False), stage.store, phase)
    return TrainedUsers(stage.model.router_parameters(), choice)


def is_trained(folder: Path) -> bool:
    """Return whether stage 3 with this folder has ended with the adapters and records of all users."""
    return (folder / _KEPT).exists()


def train_together(stages: Sequence[UserStage], bar: Bar) -> None:
    """Run stage 3 of many users, one stage per user, with the steps of all adapters in common batches.

    Each stage runs as by `train_users` until it needs adapters that are not fitted yet. All adapters that stages wait
    for are fitted together, and the stages are started again: they find the adapters in their files and go on. The
    stages differ in their users and folders only, and W_r is fixed. Nothing is kept of a batch that is killed.
    """
    left = list(stages)
    while left:
        waiting: list[_Waiting] = []

        def later(stage: UserStage, phase: AdapterPhase, found: list[_Waiting] = waiting) -> None:
            found.append(_Waiting(replace(stage, fitting=None), phase))
            raise _Waits

        for stage in left:
            try:
                train_users(replace(stage, fitting=later))
            except _Waits:
                continue
        if waiting:
            _fit(waiting, bar)
        left = [each.stage for each in waiting]


class _Waits(Exception):
    """Ends a stage that needs adapters, which are fitted together with those of the other stages."""


@dataclass(frozen=True)
class _Waiting:
    """Adapters that a stage waits for. The phase's store may be closed by then."""

    stage: UserStage
    phase: AdapterPhase


@dataclass(frozen=True)
class _AllJobs:
    """The jobs of many stages, one after another."""

    entries: Sequence[tuple[_Waiting, int]]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, at: int, /) -> Job:
        waiting, index = self.entries[at]
        return waiting.phase.jobs[index]


def _fit(waiting: Sequence[_Waiting], bar: Bar) -> None:
    """Fit the adapters that these stages wait for, and leave them where each stage finds them."""
    entries = [(each, at) for each in waiting for at in range(len(each.phase.jobs))]
    first = waiting[0].stage
    slots = min(first.most_slots, len(entries))
    trainer = MultiUserTrainer(first.model, first.config, first.rate("users"), first.seed, slots, first.pad)

    def done(results: Sequence[FitResult], again: bool) -> None:
        for result in results:
            own, _ = entries[result.state.index]
            with closing(AdapterStore(own.phase.store.folder)) as store:
                store.put([record_of(own.stage, own.phase, result)])

    trainer.run(_AllJobs(entries), done, None, first.log, waiting[0].phase.name, bar)
    for each in waiting:
        write_json(fit_marker(each.stage.folder, each.phase.name), {"users": len(each.phase.jobs)})


def _keep_on_group_tier(stage: UserStage, chosen: Sequence[int], metadata: Metadata) -> None:
    """Write group-tier records, with the reason, for the users who get no adapter."""
    marker = stage.folder / _KEPT
    if marker.exists():
        return
    others = sorted(set(range(len(stage.users))) - set(chosen))
    for at in range(0, len(others), RECORDS):
        users = ((stage.users[index], stage.embeddings[index]) for index in others[at : at + RECORDS])
        stage.store.put(
            UserRecord(user, Tier.GROUPS, storable(stage.embeddings, embedding), None, metadata(user))
            for user, embedding in users
        )
    write_json(marker, {"users": len(others)})
