"""Fits a user anew for an update, without the held-out interactions, on which the caller then compares the result.

The number of passes of the embedding and the decision on the adapter are chosen on the held-out interactions; passes
and scale of the adapter are those of the run's stage 3. A first fit (`Fitter.fit`) is not compared with a version: it
decides by held-out interactions of its own, and ends with a fit on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.quantization import decode
from proper.adapters.store import AdapterStore, UserRecord
from proper.data.encoder import EncodedExample
from proper.data.histories import TextExample
from proper.enrolment.comparison import State, losses_of, state_of
from proper.enrolment.fit_embedding import EmbeddingJob, FittedEmbedding, try_embedding
from proper.enrolment.fit_files import load_embedding, save_embedding
from proper.enrolment.fit_user import Fitter, StepCounter, UserFit, own_bank
from proper.enrolment.neighbours import nearest_trials
from proper.enrolment.place import fitted_metadata
from proper.files import private_folder
from proper.run_folder import Tier
from proper.training.held_out import item_variance, per_token, spread
from proper.training.jobs import full_passes, passes_of
from proper.training.pooled_choice import ALL_PASSES, Choice
from proper.training.tier_selection import Trial, decide
from proper.training.user_stage import AdapterPhase, fit_adapters

EMBEDDING, ADAPTER = "embedding", "update"
"""Phases that are reported as progress."""


@dataclass(frozen=True)
class Refit:
    """Fits one user anew.

    Attributes:
        fitter: the loaded run.
        fit: the user; of the history, only `items` and `held_out` are read.
        base: the version in service.
        items: the items to train on, oldest first.
        held_out: the items that decide.
        embeds: whether the embedding is fitted, too; otherwise it stays.
    """

    fitter: Fitter
    fit: UserFit
    base: UserRecord
    items: Sequence[TextExample]
    held_out: Sequence[TextExample]
    embeds: bool

    def record(self) -> UserRecord:
        """Return the user's state after the fit, with the adapter in its stored form if it helps.

        Raises:
            NonFiniteLossError: the embedding's loss is not finite.
        """
        counter, metadata, embedding = self._counter(), dict[str, Any](), self.base.embedding
        if self.embeds:
            found = self._embedding(counter)
            embedding = found.embedding
            metadata |= fitted_metadata(self.fitter.placer, found)
        counter.skip(EMBEDDING)
        if self.fitter.model.stage != Tier.USERS:
            return UserRecord(self.base.user, Tier.GROUPS, embedding, None, metadata)
        record = self._adapter(embedding, metadata, counter)
        return self._decided(record) if self.fitter.model.config.users.tiers.select else record

    @property
    def _choice(self) -> Choice:
        selected = self.fitter.model.config.users.tiers.select
        return self.fitter.choice if selected and self.fitter.choice is not None else ALL_PASSES

    def _counter(self) -> StepCounter:
        config, count = self.fitter.model.config, len(self.items)
        passes = passes_of(full_passes(config.users, count), self._choice.part)
        steps = {EMBEDDING: math.ceil(config.groups.epochs) * count if self.embeds else 0}
        return StepCounter({**steps, ADAPTER: passes * -(-count // config.users.batch_size)}, self.fit.on_progress)

    def _embedding(self, counter: StepCounter) -> FittedEmbedding:
        found = load_embedding(self.fit.work)
        if found is None:
            encoded = self._encoded(self.items)
            (start,) = self.fitter.placer.place([encoded])
            job = EmbeddingJob(self.base.user, [*encoded, *self._encoded(self.held_out)], len(self.held_out), start)
            found = try_embedding(self.fitter.embedding_setting(lambda: counter.step(EMBEDDING)), job)
            save_embedding(self.fit.work, found)
        return found

    def _adapter(self, embedding: Float[Tensor, "D"], metadata: Mapping[str, Any], counter: StepCounter) -> UserRecord:
        """Train an adapter on all of `items` as stage 3's final ones; the record says if the user is in quarantine."""
        user, choice = self.base.user, self._choice
        with closing(AdapterStore(self.fit.work / "final")) as scratch, own_bank(self.fitter.model):
            stage = self.fitter.user_stage(self.fit.store, user, self.items, embedding, self.fit.work, scratch)
            stage = replace(stage, log=lambda _: counter.step(ADAPTER))
            private_folder(stage.folder)
            jobs = stage.jobs([0], trial=False, part=choice.part)
            own = {**metadata, "scale": choice.scale}
            fit_adapters(stage, AdapterPhase("final", jobs, scratch, lambda _: own, choice.scale))
            record = scratch.get(user, coded=True)
        assert record is not None
        return record

    def _decided(self, record: UserRecord) -> UserRecord:
        """Return the record with the adapter if it helps on the held-out items, as stage 3 decides, else without."""
        if record.adapter is None:
            return record
        model, items = self.fitter.model, self._encoded(self.held_out)
        served = state_of(model, replace(record, adapter=decode(record.adapter)))
        group, own = (torch.stack(losses_of(model, each, items), 1) for each in (State(record.embedding), served))
        if not (group.isfinite().all() and own.isfinite().all()):
            metadata = {**record.metadata, "up": False, "reason": "quarantined: the held-out loss is not finite"}
            return replace(record, tier=Tier.GROUPS, adapter=None, metadata=metadata)
        count, passes = len(self.items) + len(items), int(record.metadata["passes"])
        figures = len(items), spread(group, own), item_variance(own)
        trial = Trial(record.user, count, per_token(group), per_token(own), passes, *figures)
        tiers = model.config.users.tiers
        near = (
            nearest_trials(self.fit.store, record.user, record.embedding, tiers.neighbours)
            if tiers.pools(count)
            else []
        )
        embeddings = torch.stack([record.embedding, *(theirs for _, theirs in near)])
        decision = decide([trial, *(other for other, _ in near)], embeddings, tiers)[0]
        record = replace(record, metadata={**record.metadata, **asdict(trial), **asdict(decision)})
        return record if decision.up else replace(record, tier=Tier.GROUPS, adapter=None)

    def _encoded(self, items: Sequence[TextExample]) -> list[EncodedExample]:
        return [self.fitter.model.encoder.encode(item) for item in items]
