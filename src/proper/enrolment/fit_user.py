"""Fits one new user, or one with new interactions: embedding, then stage 3 with all shared parameters frozen.

    embedding   for a user unknown to stage 2, from where the encoder places it     `place`, `fit_embedding`
    adapter     trial, tier, final as in stage 3, W_r frozen               `users.train_users`

The result depends only on the run and the user's own history: not on users fitted before, not on a kill and resume.
`Fitter.fit` returns a record; the caller puts it into the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from proper.adapters.store import AdapterStore, UserRecord
from proper.console import no_bar
from proper.data.dataset import Dataset
from proper.data.derived.views import OneHistory
from proper.data.encoder import EncodedExample
from proper.data.histories import TextExample
from proper.enrolment.fit_embedding import FittedEmbedding, Setting, fit_embedding
from proper.enrolment.fit_files import load_embedding, same_history, save_embedding
from proper.enrolment.fit_progress import ProgressCallback
from proper.enrolment.history import UserHistory, grown_history, run_data
from proper.enrolment.neighbours import nearest_adapters, nearest_trials
from proper.enrolment.place import FITTED, PLACED, Placer, embedding_jobs, fitted_metadata
from proper.errors import RunFolderError
from proper.inference.model import PersonalizedModel
from proper.interactions.log import InteractionLog
from proper.json_records import read_record
from proper.models.user_encoder import load_encoder
from proper.run_folder import RunFolder, Stage, Tier
from proper.training.jobs import Starts, full_passes
from proper.training.pooled_choice import Choice
from proper.training.starts import load_start, mean_adapter
from proper.training.user_stage import UserStage
from proper.training.users import is_trained, train_users

START_NEIGHBOURS = 5
"""Users whose mean adapter a new user's starts from, with `users.start: neighbours`."""


@dataclass(frozen=True)
class UserFit:
    """One user to fit.

    Attributes:
        store: the store of the user's tenant; only read.
        user: the user's id.
        grown: the user's history, with at least one item.
        work: checkpoint folder from which an interrupted fit of the same history resumes; the caller removes it once
            the record is saved.
        on_progress: progress callback; called after every step, and may raise to stop.
    """

    store: AdapterStore
    user: str
    grown: UserHistory
    work: Path
    on_progress: ProgressCallback


@dataclass(frozen=True)
class Fitter:
    """A loaded run, ready to fit one user after another.

    Attributes:
        dataset: the run's prepared data; None if it no longer exists.
        seed: the run's seed.
        placer: places the embeddings of new users.
        choice: the passes and the scale of the run's adapters; None if the run does not say, as older ones.
    """

    folder: Path
    model: PersonalizedModel
    dataset: Dataset | None
    seed: int
    placer: Placer
    choice: Choice | None = None

    def close(self) -> None:
        """Close the model's store and the data."""
        self.model.close()
        if self.dataset is not None:
            self.dataset.close()

    def fit(self, fit: UserFit) -> UserRecord:
        """Return a user's new record; nothing is put into the store.

        Raises:
            NonFiniteLossError: the embedding's loss is not finite.
        """
        same_history(fit.work, fit.grown, self.groups)
        with self.model.model.caching(fit.work, self.model.config.compute.cache_mb):
            return self._fit(fit)

    @property
    def groups(self) -> str | None:
        """The hash of the groups that users are fitted to."""
        return None if self.model.served is None else self.model.served.groups

    @property
    def bound(self) -> dict[str, str]:
        """What a store is bound to that takes this fitter's records (`AdapterStore.put`, `only_if_bound`)."""
        return {} if self.groups is None else {"groups": self.groups}

    def history(self, log: InteractionLog, tenant: str, user: str) -> UserHistory:
        """Return a user's items: those of the run's data, and those logged since."""
        return grown_history(self.dataset, log, tenant, user, self.model.config.task.kind)

    def items(self, grown: UserHistory) -> tuple[TextExample, ...]:
        """Return the items that a user is fitted to: the newest `users.max_items`."""
        return grown.items[-(self.model.config.users.max_items or len(grown.items)) :]

    def encoded(self, grown: UserHistory) -> list[EncodedExample]:
        """Return the tokens of these items."""
        return [self.model.encoder.encode(example) for example in self.items(grown)]

    def embedding_setting(self, step: Callable[[], None]) -> Setting:
        """Return the setting with which embeddings are fitted; `step` is called after every step of every user."""
        return Setting(self.model.model, self.model.config.groups, self.seed, step)

    def _fit(self, fit: UserFit) -> UserRecord:
        items = self.items(fit.grown)
        counter = StepCounter.of(self.model, len(items), fit.on_progress)
        held = fit.store.versions(fit.user)
        metadata: dict[str, Any] = {"history": {"run": fit.grown.run, "logged": fit.grown.logged}}
        head = fit.store.head(fit.user)
        if head is None or held[0].metadata.get("embedding") in (FITTED, PLACED):
            found = self._embedding(fit, counter)
            metadata |= fitted_metadata(self.placer, found)
            embedding = found.embedding
        else:
            counter.skip("embedding")
            embedding = head.embedding
        if self.model.stage != Tier.USERS:
            return UserRecord(fit.user, Tier.GROUPS, embedding, None, metadata)
        record = self._adapter(fit, items, embedding, counter)
        return replace(record, metadata={**record.metadata, **metadata})

    def _embedding(self, fit: UserFit, counter: StepCounter) -> FittedEmbedding:
        found = load_embedding(fit.work)
        if found is None:
            validation = self.model.config.users.tiers.validation
            (job,) = embedding_jobs(self.placer, [(fit.user, self.encoded(fit.grown))], validation)
            found = fit_embedding(self.embedding_setting(lambda: counter.step("embedding")), job)
            save_embedding(fit.work, found)
        counter.skip("embedding")
        return found

    def _adapter(
        self, fit: UserFit, items: Sequence[TextExample], embedding: Float[Tensor, "D"], counter: StepCounter
    ) -> UserRecord:
        """Run stage 3 for one user into a temporary store, and return the record from there."""

        def count(metrics: Mapping[str, Any]) -> None:
            counter.step(str(metrics["phase"]).removeprefix("users: "))

        with closing(AdapterStore(fit.work / "final")) as scratch, own_bank(self.model):
            stage = self.user_stage(fit.store, fit.user, items, embedding, fit.work, scratch)
            if not is_trained(stage.folder):
                train_users(replace(stage, log=count))
            record = scratch.get(fit.user, coded=True)
        assert record is not None
        return record

    def user_stage(
        self,
        store: AdapterStore,
        user: str,
        items: Sequence[TextExample],
        embedding: Float[Tensor, "D"],
        work: Path,
        scratch: AdapterStore,
    ) -> UserStage:
        """Return stage 3 of one user; records go to `scratch`, files to the work folder, and `store` is only read."""
        config = self.model.config
        return UserStage(
            model=self.model.model,
            config=config.users,
            dataset=OneHistory(user, items),
            encoder=self.model.encoder,
            users=[user],
            embeddings=embedding.unsqueeze(0),
            store=scratch,
            folder=work / "stage",
            seed=self.seed,
            checkpoint_seconds=config.compute.checkpoint_seconds,
            log=lambda metrics: None,
            fixed_router=True,
            choice=self.choice,
            bar=no_bar,
            others=lambda near: nearest_trials(store, user, near[0], config.users.tiers.neighbours),
            starts=self._starts(store),
        )

    def _starts(self, store: AdapterStore) -> Starts:
        """Return where the adapters of new users start."""
        config = self.model.config.users
        if config.start != "neighbours":
            return load_start(config, RunFolder(self.folder).users.start)
        layout = self.model.model.user_layout(config)

        def mean(user: str, embedding: Float[Tensor, "D"]) -> Float[Tensor, "P"] | None:
            adapters = nearest_adapters(store, user, embedding, START_NEIGHBOURS)
            return mean_adapter(adapters, layout) if adapters else None

        return mean


def open_fitter(folder: Path, model: PersonalizedModel) -> Fitter:
    """Return a fitter for a loaded run.

    Raises:
        RunFolderError: the run has no group experts, on which new users are fitted.
    """
    if model.served is None:
        raise RunFolderError(f"{folder}: stage 'groups' is not trained yet, and new users need it")
    run = RunFolder(folder)
    marker = run.marker(Stage.USERS)
    chosen = read_record(marker).get("choice") if marker.exists() else None
    choice = Choice.read(chosen, marker) if chosen is not None else None
    seed = int(read_record(run.marker(Stage.GROUPS), seed=int)["seed"])
    placer = Placer(model.model, model.served.mean, load_encoder(run.encoder))
    return Fitter(folder, model, run_data(folder), seed, placer, choice)


@contextmanager
def own_bank(model: PersonalizedModel) -> Iterator[None]:
    """Let training replace the model's adapter bank while the block runs, and restore the serving bank after it."""
    try:
        yield
    finally:
        assert model.served is not None
        model.model.use_bank(model.served.bank)


class StepCounter:
    """Progress of a fit: steps done, out of the maximum number, by phase."""

    def __init__(self, expected: dict[str, int], on_progress: ProgressCallback) -> None:
        self.expected, self.on_progress = expected, on_progress
        self.done = dict.fromkeys(expected, 0)

    @classmethod
    def of(cls, model: PersonalizedModel, items: int, on_progress: ProgressCallback) -> StepCounter:
        """Count the steps of every phase in full for so many items; early stopping may end a phase sooner."""
        config = model.config
        batches = -(-items // config.users.batch_size) * full_passes(config.users, items)
        adapter = {"trial": batches, "final": batches} if model.stage == "users" else {}
        return cls({"embedding": 2 * items * math.ceil(config.groups.epochs), **adapter}, on_progress)

    def step(self, phase: str) -> None:
        """Count one step of a phase; earlier phases count as complete."""
        for before in self.expected:
            if before == phase:
                break
            self.done[before] = self.expected[before]
        self.done[phase] = min(self.expected[phase], self.done[phase] + 1)
        self.on_progress(phase, sum(self.done.values()) / sum(self.expected.values()))

    def skip(self, phase: str) -> None:
        """Mark a phase as complete."""
        self.done[phase] = self.expected[phase]
