"""Python API behind `proper.load`: a run as one model for all users, with enrolment, update and deletion of users.

This module imports the training code, because new users are fitted with it; `proper.inference` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from proper.adapters.store import AdapterStore, Head, Version
from proper.config import Config
from proper.data.chat import readable
from proper.enrolment.drift import Drift
from proper.enrolment.fit_progress import ProgressCallback, no_progress
from proper.enrolment.fit_user import Fitter, open_fitter
from proper.enrolment.worker import FitWorker
from proper.errors import InputError, ProperError, RunFolderError
from proper.export.run_export import Format, export_user
from proper.inference.generate import Answer, generate, respond
from proper.inference.loading import load as load_personalized
from proper.inference.model import PersonalizedModel
from proper.inference.sampling import Sampling
from proper.inference.score import score
from proper.interactions.deletion import remove
from proper.interactions.log import ExistsError, InteractionLog, LogEntry
from proper.interactions.parsing import read_rows, record_reader, with_known_labels
from proper.run_folder import Tier

Row = Mapping[str, Any]


class Users:
    """The users of a run; `enrol` and `update` fit the user before they return.

    Args:
        folder: the run folder.
        store: the adapter store of the run.
        fitter: prepares the run for fits; called when there is first something to fit.
    """

    def __init__(self, folder: Path, store: AdapterStore, fitter: Callable[[], Fitter]) -> None:
        self.folder, self.store = folder, store
        self.log = InteractionLog(store.folder)
        self.worker = FitWorker(store.folder, self.log, fitter)

    def __iter__(self) -> Iterator[str]:
        return (user for user, _ in self.store.users())

    def __contains__(self, user: object) -> bool:
        return isinstance(user, str) and (self.store.head(user) is not None or self.log.knows(self.store.tenant, user))

    def head(self, user: str) -> Head | None:
        """Return a user's tier, version and embedding; None if the user is unknown or was never fitted."""
        return self.store.head(user)

    def versions(self, user: str) -> list[Version]:
        """Return a user's stored versions, newest first."""
        return self.store.versions(user)

    def rollback(self, user: str, to: int | None = None) -> int:
        """Make an older version current again and return its new number; see `AdapterStore.rollback`."""
        return self.store.rollback(user, to)

    def enrol(self, user: str, interactions: Iterable[Row], on_progress: ProgressCallback | None = None) -> Head | None:
        """Enrol and fit a new user; return their tier, version and embedding, or None if there is nothing to fit yet.

        Args:
            user: id of the new user.
            interactions: rows in the run's own columns, or `{"prompt": ..., "target": ...}`; see `entries`.
            on_progress: progress callback of the fit.

        Raises:
            InputError: the user exists already, or two interactions have the same id and different content.
            DataError: an interaction cannot be used; the message names it.
            ProperError: the fit failed; the message says why. The interactions are kept, `update` tries again.
        """
        entries = self.entries(user, interactions)
        if user in self:
            raise ExistsError(f"user {user!r} exists already; users.update adds interactions")
        return self.append(user, entries, new=True, on_progress=on_progress)

    def enrol_many(
        self,
        entries: Mapping[str, Sequence[LogEntry]],
        *,
        refine: bool = True,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """Enrol many new users, all or none: place their embeddings at once, then fit them.

        Args:
            entries: the users' interactions, as `entries` returns them.
            refine: whether to fit the users; without, they keep their placed embeddings and stay in the fit queue.
            on_progress: progress callback (phase, share of it that is done).

        Raises:
            InputError: a user exists already, or two interactions of a user have the same id and different content.
            ProperError: fits failed; the message says how many and why the first one did. The others are done.
        """
        for user in entries:
            if user in self:
                raise ExistsError(f"user {user!r} exists already; users.update adds interactions")
        self.worker.enrol(self.store, entries, refine=refine, on_progress=on_progress or no_progress)

    def update(
        self, user: str, interactions: Iterable[Row] = (), on_progress: ProgressCallback | None = None
    ) -> Head | None:
        """Add interactions of a user and update the user; return tier, version and embedding.

        The update is trained from the version in service and becomes a new version only if that lowers the loss on
        held-out interactions (`enrolment.update_user`); else the version stays, and `log.updates` has the reason.

        Args:
            user: id of an existing user.
            interactions: as for `enrol`; with none, those in the log that are new to the version in service.
            on_progress: progress callback of the fit.

        Raises:
            InputError: there is no such user, or an interaction's id exists with different content.
            DataError: an interaction cannot be used; the message names it.
            ProperError: the fit failed; the message says why.
        """
        entries = self.entries(user, interactions)
        if user not in self:
            raise InputError(f"{self.store.folder}: there is no user {user!r}; users.enrol adds a new user")
        return self.append(user, entries, new=False, on_progress=on_progress)

    def drift(self) -> list[Drift]:
        """Return the drift of all users with new interactions, the highest score first; see `enrolment.drift`."""
        return self.worker.drift(self.store)

    def update_drifted(self, budget: int | None = None, hours: float | None = None) -> list[Drift]:
        """Update the users who have drifted, the highest score first; see `FitWorker.update_drifted`."""
        return self.worker.update_drifted(self.store, budget, hours)

    def delete(self, user: str) -> bool:
        """Delete all data of a user from every file of the run; return whether there was any.

        Raises:
            InputError: a stage is being trained that the user is part of.
            ProperError: data of the user is left because another process is reading or writing; the next command that
                writes into the run, or `proper users check`, continues the deletion.
        """
        removal = remove(self.store, self.log, user)
        if removal.waits:
            raise ProperError(f"user {user!r} is not deleted from all files yet: {removal.waits[0]}")
        return removal.found

    def export(self, user: str, path: str | Path, *, form: Format = "native", force: bool = False) -> Path:
        """Export a user to a folder and return its path; see `run_export.export_user`."""
        export_user(self.folder, user, Path(path), form=form, force=force)
        return Path(path)

    def close(self) -> None:
        """Close the interaction log."""
        self.log.close()

    def entries(self, user: str, rows: Iterable[Row]) -> list[LogEntry]:
        """Return log entries for interactions in the formats that `enrol` accepts.

        Raises:
            DataError: an interaction cannot be used; the message names it.
        """
        config = self.worker.fitter().model.config
        task = with_known_labels(self.folder, config.task)
        named = ((f"interactions[{at}]", row) for at, row in enumerate(rows))
        return read_rows(named, record_reader(config.data, task, user))

    def append(
        self, user: str, entries: list[LogEntry], *, new: bool, on_progress: ProgressCallback | None = None
    ) -> Head | None:
        """Log entries and fit the user; the common part of `enrol` and `update`.

        Raises:
            InputError: `new` and the user exists, or an entry's id exists with different content.
            ProperError: the fit failed; the message says why.
        """
        tenant = self.store.tenant
        self.log.append(tenant, user, entries, new=new)
        if entries or not new:
            self.log.request_fit(tenant, user)
        fit = self.worker.fit(tenant, user, on_progress or no_progress)
        if fit.state == "failed":
            raise ProperError(f"user {user!r} could not be fitted: {fit.message}")
        return self.store.head(user)


class Model:
    """A run loaded as one model for all its users, as `proper.load` returns it.

    Attributes:
        personalized: the model that computes; functions of `proper.inference` take it.
    """

    def __init__(self, folder: Path, personalized: PersonalizedModel) -> None:
        self.personalized = personalized
        self._folder = folder
        self._fitter: Fitter | None = None
        self._users: Users | None = None

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.personalized.config

    @property
    def stage(self) -> Tier:
        """The last stage that is applied."""
        return self.personalized.stage

    @property
    def users(self) -> Users:
        """The users of the run: enrol, update, delete, export.

        Raises:
            RunFolderError: the run has none: its stage 2 is missing.
        """
        if self.personalized.store is None:
            raise RunFolderError(
                f"{self._folder}: stage 'groups' is not trained yet; run: proper run CONFIG --out {self._folder}"
            )
        if self._users is None:
            self._users = Users(self._folder, self.personalized.store, self._make_fitter)
        return self._users

    def generate(
        self,
        prompts: Sequence[str],
        user_ids: Sequence[str | None],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        task: str | None = None,
    ) -> list[str]:
        """Return one continuation per prompt, each for its own user; a batch may mix any users.

        Each prompt has its own generator seeded with `seed`, so its answer does not depend on the other prompts, and a
        repeated prompt of the same user gets the same answer. `task` names the prompts' task in a run of several.

        Raises:
            InputError: the two lists differ in length, or a prompt is empty.
            StoreError: a user's adapter is damaged.
        """
        return generate(
            self.personalized,
            _texts(prompts),
            user_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            task=task,
        )

    def respond(
        self, prompts: Sequence[str], user_ids: Sequence[str | None], sampling: Sampling | None = None
    ) -> list[Answer]:
        """Like `generate`, but return answers that also name their user and the tier that answered."""
        return respond(self.personalized, _texts(prompts), user_ids, sampling)

    def score(
        self, prompts: Sequence[str], user_ids: Sequence[str | None], labels: Sequence[str], task: str | None = None
    ) -> Float[Tensor, "B L"]:
        """Return the log-likelihood (nats) of every label after every prompt, as of `task` (see `generate`).

        Raises:
            StoreError: a user's adapter or embedding is damaged.
            ProperError: a likelihood is NaN; the message names the user.
        """
        return score(self.personalized, _texts(prompts), user_ids, labels, task=self.config.task_number(task))

    def tier(self, user: str | None) -> str:
        """Return the tier that answers this user: "base", "population", "none", "groups" or "users"."""
        return self.personalized.tier(user)

    def close(self) -> None:
        """Close the store, the interaction log and the data set."""
        if self._users is not None:
            self._users.close()
        if self._fitter is not None and self._fitter.dataset is not None:
            self._fitter.dataset.close()
        self.personalized.close()

    def _make_fitter(self) -> Fitter:
        if self._fitter is None:
            self._fitter = open_fitter(self._folder, self.personalized)
        return self._fitter


def load(folder: str | Path, stage: str | None = None) -> Model:
    """Load a run folder as one model for all its users.

    Args:
        folder: a run folder that `proper run` wrote.
        stage: the last stage to load (base, population, groups or users); the last one that the folder has if None.

    Raises:
        RunFolderError: the folder is not a run folder, or the stage is not trained yet.
    """
    return Model(Path(folder), load_personalized(folder, stage))


def _texts(prompts: Sequence[str]) -> Sequence[str]:
    """Return prompts of one message each, whatever their authors wrote; what is not text is refused later."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return prompts
    return [readable(each) if isinstance(each, str) else each for each in prompts]
