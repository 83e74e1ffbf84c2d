"""Stage 3 training: a LoRA adapter per user who gains from one, then the LoRA-aware router (method: stage 3, tiers).

1. trials:  every user's adapter on the older part of the history; one choice of passes and scale for all; the users
who gain from an adapter (`trials`)
2. final:   the adapters of these users, on all their items, for the chosen passes and at the chosen scale (3a)
3. 3b, if the config has a LoRA-aware router: on the final adapters, or in the trials on their held-out items
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from proper.adapters.store import UserRecord
from proper.files import private_folder, write_json
from proper.run_folder import Tier
from proper.training.pooled_choice import EVERYTHING, Choice
from proper.training.tier_selection import storable
from proper.training.trials import select
from proper.training.user_stage import Metadata, UserStage, fit_adapters, fit_router, fitted, no_metadata

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
        chosen, choice, metadata = list(range(len(stage.users))), EVERYTHING, no_metadata
    jobs = stage.jobs(chosen, trial=False, part=choice.part)
    fit_adapters(stage, jobs, stage.store, "final", metadata, choice.scale)
    _keep_on_group_tier(stage, chosen, metadata)
    # A router of the trials' held-out items is loaded: it must not see the items of the final adapters' fit.
    phase = "trial" if stage.config.router_on_held_out else "final"
    fit_router(stage, stage.jobs(fitted(stage, chosen, stage.store), trial=False), stage.store, phase)
    return TrainedUsers(stage.model.router_parameters(), choice)


def _keep_on_group_tier(stage: UserStage, chosen: Sequence[int], metadata: Metadata) -> None:
    """Write group-tier records, with the reason, for the users who get no adapter."""
    marker = stage.folder / "kept.json"
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
