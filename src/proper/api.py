"""What `proper.load` returns: a run in memory that answers everybody, and its users, who can come, grow and go.

Stands above training, because new users are fitted with it; everything else about answering is `inference`'s. Knows
nothing about HTTP or terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from proper.adapters.store import AdapterStore, Head, Version
from proper.enrolment.fit_user import Fitter, open_fitter
from proper.enrolment.worker import FitWorker, Heard
from proper.errors import InputError, ProperError, RunFolderError
from proper.export.run_export import Format, export_user
from proper.inference.personalized import PersonalizedModel, Stage
from proper.inference.personalized import load as load_personalized
from proper.interactions.deletion import remove
from proper.interactions.log import ExistsError, InteractionLog, LogEntry
from proper.interactions.parsing import read_rows, record_reader

Row = Mapping[str, Any]


class Users:
    """The users of a run.

    Whoever is taken in or has something new is fitted before the call returns.

    Args:
        folder: the run.
        store: their records.
        fitter: makes the run ready for fits; called when there is first something to fit.
    """

    def __init__(self, folder: Path, store: AdapterStore, fitter: Callable[[], Fitter]) -> None:
        self.folder, self.store = folder, store
        self.log = InteractionLog(store.folder)
        self.desk = FitWorker(store.folder, self.log, fitter)

    def __iter__(self) -> Iterator[str]:
        return (user for user, _ in self.store.users())

    def __contains__(self, user: object) -> bool:
        return isinstance(user, str) and (self.store.head(user) is not None or self.log.knows(self.store.tenant, user))

    def head(self, user: str) -> Head | None:
        """Return a user's tier, version and embedding; None for one who is unknown or was never fitted."""
        return self.store.head(user)

    def versions(self, user: str) -> list[Version]:
        """Return a user's stored versions, newest first."""
        return self.store.versions(user)

    def rollback(self, user: str, to: int | None = None) -> int:
        """Make an older version current again and return its new number; see `AdapterStore.rollback`."""
        return self.store.rollback(user, to)

    def enrol(self, user: str, interactions: Iterable[Row], heard: Heard | None = None) -> Head | None:
        """Take in a user, fit them, and return what they got; None where there is nothing to fit yet.

        Args:
            user: who; nobody of that name may be there.
            interactions: rows in the run's own columns, or `{"prompt": ..., "target": ...}`; see `entries`.
            heard: hears how far the fit is.

        Raises:
            InputError: the user is there already, or two interactions have one id and different content.
            DataError: an interaction cannot be used; names it.
            ProperError: the fit failed; says why. The interactions are kept, `update` tries again.
        """
        entries = self.entries(user, interactions)
        if user in self:
            raise ExistsError(f"there is a user {user!r} already; users.update adds to what they have")
        return self.append(user, entries, new=True, heard=heard)

    def update(self, user: str, interactions: Iterable[Row] = (), heard: Heard | None = None) -> Head | None:
        """Add interactions of a user, fit them to all that is known of them, and return what they got.

        Args:
            user: who; they must be there.
            interactions: as for `enrol`; with none, what is known is fitted again.
            heard: hears how far the fit is.

        Raises:
            InputError: there is no such user, or an id is taken by other content.
            DataError: an interaction cannot be used; names it.
            ProperError: the fit failed; says why.
        """
        entries = self.entries(user, interactions)
        if user not in self:
            raise InputError(f"{self.store.folder}: there is no user {user!r}; users.enrol takes one in")
        return self.append(user, entries, new=False, heard=heard)

    def delete(self, user: str) -> bool:
        """Remove all of a user from every file of the run; return whether there was anything.

        Raises:
            InputError: a stage is being trained that the user is part of.
            ProperError: bytes of the user are still there, as another process reads or writes; the next command that
                writes into the run, or `proper users check`, goes on with it.
        """
        removal = remove(self.store, self.log, user)
        if removal.waits:
            raise ProperError(f"user {user!r} is not gone from all files yet: {removal.waits[0]}")
        return removal.found

    def export(self, user: str, path: str | Path, *, form: Format = "native", force: bool = False) -> Path:
        """Write all of a user to a folder and return it; see `exchange.export_user`."""
        export_user(self.folder, user, Path(path), form=form, force=force)
        return Path(path)

    def close(self) -> None:
        """Close the log."""
        self.log.close()

    def entries(self, user: str, rows: Iterable[Row]) -> list[LogEntry]:
        """Read interactions as `enrol` takes them.

        Raises:
            DataError: one cannot be used; names it.
        """
        config = self.desk.fitter().model.config
        named = ((f"interactions[{at}]", row) for at, row in enumerate(rows))
        return read_rows(named, record_reader(config.data, config.task, user))

    def append(self, user: str, entries: list[LogEntry], *, new: bool, heard: Heard | None = None) -> Head | None:
        """Log entries and fit the user; `enrol` and `update` are made of this.

        Raises:
            InputError: the user is known and `new`, or an id is taken by other content.
            ProperError: the fit failed; says why.
        """
        tenant = self.store.tenant
        self.log.append(tenant, user, entries, new=new)
        if entries or not new:
            self.log.request_fit(tenant, user)
        while self.desk.fit_next(tenant, user, *([heard] if heard is not None else [])):
            pass
        fit = self.log.queue.fit(tenant, user)
        if fit.state == "failed":
            raise ProperError(f"user {user!r} could not be fitted: {fit.message}")
        return self.store.head(user)


class Model(PersonalizedModel):
    """A run in memory.

    Attributes:
        users: its users.
    """

    def __init__(self, folder: Path, loaded: PersonalizedModel) -> None:
        super().__init__(loaded.model, loaded.encoder, loaded.config, loaded.cache, loaded.stage)
        self._folder = folder
        self._fitter: Fitter | None = None
        self._users: Users | None = None

    @property
    def users(self) -> Users:
        """The users of the run.

        Raises:
            RunFolderError: the run has none: its stage 2 is missing.
        """
        if self.store is None:
            raise RunFolderError(f"{self._folder}: no users yet; the run has not come that far")
        if self._users is None:
            self._users = Users(self._folder, self.store, self._make_fitter)
        return self._users

    def close(self) -> None:
        """Close store, log and data."""
        if self._users is not None:
            self._users.close()
        if self._fitter is not None and self._fitter.dataset is not None:
            self._fitter.dataset.close()
        super().close()

    def _make_fitter(self) -> Fitter:
        if self._fitter is None:
            self._fitter = open_fitter(self._folder, self)
        return self._fitter


def load(folder: str | Path, stage: Stage | None = None) -> Model:
    """Load a run folder as one model for all its users.

    Args:
        folder: what `proper run` wrote.
        stage: how far up the ladder to go; the highest that the folder has if None.

    Raises:
        RunFolderError: the folder is not a run, or has not got that far.
    """
    return Model(Path(folder), load_personalized(folder, stage))
