"""Trials of stage 3: every user's adapter on the older part of the history, the pooled choice, and the tiers.

    1. trial:   3a on the older items of every user, with the held-out loss at several passes and scales
    2. choice:  one number of passes and one scale for all users (`pooled_choice`)
    3. tiers:   the users who gain from an adapter (`tier_selection`)

With a LoRA-aware router, it is trained on the trial adapters first, each at its best pass and at scale 1, and gains are
measured with it, because users are served in that form. With `users.router_items: held-out` it is trained on the
held-out items, so they cannot measure it, and gains are those of the adapters alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from proper.adapters.store import AdapterStore
from proper.files import write_json
from proper.json_records import read_record
from proper.training.held_out import item_variance, per_token, spread
from proper.training.jobs import PARTS, HistoryJobs, full_passes, refusal
from proper.training.microbatching import item_losses
from proper.training.pooled_choice import Choice, TrialCurve, choose
from proper.training.tier_selection import Trial, decide, refused
from proper.training.user_stage import (
    AdapterPhase,
    Metadata,
    UserStage,
    adapter_of,
    fit_adapters,
    fit_router,
    fitted,
    warn,
)

Quarantined = Mapping[str, Mapping[str, Any]]
"""By user in quarantine, the metadata of the record, which says why."""


def select(stage: UserStage) -> tuple[list[int], Choice, Metadata]:
    """Run trials, choice and tier selection; return the users who get an adapter, the choice, and the metadata."""
    trials, choice, quarantined = _trials(stage)
    index = {user: at for at, user in enumerate(stage.users)}
    embeddings = stage.embeddings[[index[trial.user] for trial in trials]]
    pooled = any(stage.config.tiers.pools(trial.items) for trial in trials)
    others = stage.others(embeddings) if pooled else ()
    near = torch.cat([embeddings, *(embedding.unsqueeze(0) for _, embedding in others)])
    decisions = decide([*trials, *(trial for trial, _ in others)], near, stage.config.tiers)[: len(trials)]
    decided = {trial.user: (trial, decision) for trial, decision in zip(trials, decisions, strict=True)}
    chosen = [at for at, user in enumerate(stage.users) if user in decided and decided[user][1].up]

    def metadata(user: str) -> Mapping[str, Any]:
        if user in decided:
            trial, decision = decided[user]
            return {**asdict(trial), **asdict(decision), "scale": choice.scale}
        if user in quarantined:
            return quarantined[user]
        job = stage.jobs([index[user]], trial=False)[0]
        return {"reason": refusal(job, None) or "one item cannot be both trained on and held out"}

    return chosen, choice, metadata


def _trials(stage: UserStage) -> tuple[list[Trial], Choice, Quarantined]:
    """Return the trials, the choice, and the metadata of users in quarantine."""
    path = stage.folder / "trials.json"
    store = AdapterStore(stage.folder / "trial")
    try:
        if not path.exists():
            part = PARTS if stage.choice is None else stage.choice.part
            fit_adapters(stage, AdapterPhase("trial", stage.jobs(stage.trial_users, trial=True, part=part), store))
            jobs = stage.jobs(fitted(stage, stage.trial_users, store), trial=True, part=part)
            curves = [_curve(stage, jobs, at, store) for at in range(len(jobs))]
            choice = stage.choice or choose(curves)
            trials = [curve.at(choice) for curve in curves]
            if stage.config.router_on_held_out:
                fit_router(stage, replace(jobs, held_out=True), store, "trial")
            elif stage.model.router_parameters():
                fit_router(stage, jobs, store, "trial")
                trials = list(_measured(stage, jobs, store))
            write_json(path, {"choice": asdict(choice), "trials": [asdict(trial) for trial in trials]})
        quarantined = {user: metadata for user, tier, metadata, _ in store.metadata() if tier == "groups"}
    finally:
        store.close()
    found = read_record(path, trials=list, choice=dict)
    return [Trial(**trial) for trial in found["trials"]], Choice.read(found["choice"], path), quarantined


def _curve(stage: UserStage, jobs: HistoryJobs, at: int, store: AdapterStore) -> TrialCurve:
    """Return the held-out losses of one user's trial."""
    user = jobs.users[at]
    metadata = store.versions(user)[0].metadata
    items, held_out = int(metadata["items"]), len(metadata["before"])
    return TrialCurve(
        user,
        items + held_out,
        held_out,
        full_passes(stage.config, items),
        (*stage.config.scales, 1.0),
        float(metadata["held_losses"][0]),
        metadata["grid"],
        metadata["spreads"],
        item_variance(torch.tensor(metadata["before"], dtype=torch.float64)),
    )


def _measured(stage: UserStage, jobs: HistoryJobs, store: AdapterStore) -> Iterator[Trial]:
    """Yield every user's held-out loss on the group tier and in the served form."""
    model = stage.model
    bank = model.add_bank(stage.config, stage.slots)
    for at in range(0, len(jobs), stage.slots):
        cohort = {slot: jobs[at + slot] for slot in range(min(stage.slots, len(jobs) - at))}
        passes: dict[int, int] = {}
        for slot, job in cohort.items():
            adapter, metadata = adapter_of(store, job.user)
            bank.layout.pack(adapter, bank.values[slot])
            passes[slot] = int(metadata["passes"])
        group = item_losses(model, cohort, "groups", stage.pad)
        own = item_losses(model, cohort, "users", stage.pad)
        for slot, job in cohort.items():
            if group[slot].isfinite().all() and own[slot].isfinite().all():
                items, held_out = len(job.items) + len(job.held_out), len(job.held_out)
                losses = per_token(group[slot]), per_token(own[slot])
                gain_spread, variance = spread(group[slot], own[slot]), item_variance(own[slot])
                yield Trial(job.user, items, *losses, passes[slot], held_out, gain_spread, variance)
            else:
                reason = "quarantined: the held-out loss is not finite"
                warn(job.user, reason)
                store.put([refused(stage.embeddings, job.user, job.embedding, reason, {})])
