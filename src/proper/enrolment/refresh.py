"""Refreshes the groups: continues stage 2 with new interactions, and moves all users to the new groups.

    train      experts, routers and users' embeddings, from those in service, on the interactions logged since the
               last refresh and as many replayed earlier ones; every user's newest items are held out
    validate   each user's held-out loss as served, and under the new groups
    commit     one transaction of the store binds it to the new groups and adds a version of every user: with the
               adapter if it is no worse there, else on the group tier; then the files move (`settle_groups`)
    refit      the users who lost an adapter, as new users are fitted

A kill before the commit leaves the old groups in service, and one after it the new ones; the same call continues. The
groups before the last refresh are kept, and `roll_back` returns to them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proper.adapters.records import MADE
from proper.adapters.store import AdapterStore, UserRecord
from proper.console import progress
from proper.data.encoder import EncodedExample
from proper.data.histories import TextExample
from proper.enrolment.comparison import State, Usual, losses_of, per_item, state_of
from proper.enrolment.fit_user import Fitter, open_fitter, own_bank
from proper.enrolment.group_versions import BY, versions_before
from proper.enrolment.history import Rows, UserHistory
from proper.enrolment.lost_adapters import refit
from proper.errors import ChangedError, RunFolderError
from proper.files import hash_file, hash_value
from proper.inference.loading import load, settle_groups
from proper.inference.model import PersonalizedModel
from proper.interactions.log import InteractionLog
from proper.models.checkpoints import fill, load_metadata, load_tensors, save_tensors
from proper.run_folder import RunFolder, Stage, Tier
from proper.training.checkpoint import seed_of
from proper.training.groups import train_groups
from proper.training.jobs import held_out_items
from proper.training.metrics_log import no_log
from proper.training.plans import stage_plan
from proper.training.stages import join_processes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refreshed:
    """Outcome of a refresh or of a return to the previous groups.

    Attributes:
        rows: interactions that were new to the groups; 0 if nothing was trained.
        users: users of the store.
        validated: users with held-out items.
        worse: users whose adapter is worse under the new groups; they were refitted.
        adapters: how many of these have an adapter again.
    """

    rows: int
    users: int
    validated: int = 0
    worse: int = 0
    adapters: int = 0


def refresh(folder: Path, left_out: Collection[str] = ()) -> Refreshed:
    """Train a run's stage 2 on, and take its users along (see the module).

    Args:
        folder: the run folder; the caller holds its locks.
        left_out: users whose items are not trained on.

    Raises:
        RunFolderError: a stage is missing, the store has users of other tenants (also if the first one comes
            meanwhile), or the run has several tasks or privacy.
    """
    run = RunFolder(folder)
    with _opened(folder) as work:
        worse, again = refit(work.fitter, work.store, work.log)  # those of a call that was killed
        rows = work.rows(left_out)
        if not run.users.refresh.exists():
            run.refreshed.unlink(missing_ok=True)  # of a way back that was killed
        if not run.refreshed.exists():
            if not rows.size:
                return Refreshed(0, len(work.users), worse=worse, adapters=again)
            work.train(rows)
    with _opened(folder) as work:  # training has changed the model
        validated = work.commit()
    with _opened(folder) as work:
        worse, again = refit(work.fitter, work.store, work.log)
        return Refreshed(rows.size, len(work.users), validated, worse, again)


def roll_back(folder: Path) -> Refreshed:
    """Return to the groups before the last refresh, and to the users' versions that were made for them.

    A user without such a version any more, as after a later update, keeps the embedding and is fitted again.

    Raises:
        RunFolderError: there are no earlier groups.
    """
    run = RunFolder(folder)
    if not run.previous.exists() or hash_file(run.previous) == hash_file(run.experts):
        raise RunFolderError(f"{folder}: no groups from before a refresh are kept; there is nothing to go back to")
    with _opened(folder) as work:
        if not run.refreshed.exists() or hash_file(run.refreshed) != hash_file(run.previous):
            run.users.refresh.unlink(missing_ok=True)  # of a refresh that was killed before its commit
            tensors, metadata = load_tensors(run.previous)
            save_tensors(run.refreshed, tensors, metadata)
        work.go_back()
    with _opened(folder) as work:
        worse, again = refit(work.fitter, work.store, work.log)
        return Refreshed(0, len(work.users), worse=worse, adapters=again)


def _opened(folder: Path) -> closing[_Work]:
    model = load(folder)
    log = InteractionLog(RunFolder(folder).users.path)
    return closing(_Work(RunFolder(folder), model, open_fitter(folder, model), log))


class _Work:
    """A loaded run whose groups are refreshed.

    Attributes:
        users: the users of the store, in its order.
    """

    def __init__(self, run: RunFolder, model: PersonalizedModel, fitter: Fitter, log: InteractionLog) -> None:
        assert model.store is not None
        self.run, self.model, self.fitter, self.log = run, model, fitter, log
        self.store: AdapterStore = model.store
        self.users = [user for user, _ in self.store.users()]
        self._require_one_tenant()
        if model.config.tasks:
            raise RunFolderError(f"{run.path}: is a run over several tasks, whose groups cannot be refreshed yet")
        if model.config.privacy.on:
            raise RunFolderError(f"{run.path}: was trained with privacy, and a refresh trains without noise")

    def _require_one_tenant(self) -> None:
        """Require that no other tenant has users; otherwise what a refresh has trained so far is given up.

        A refresh that cannot end would keep users from being deleted.
        """
        if any(tenant != self.store.tenant for tenant, _ in self.store.manifest.owners_of_records()):
            for path in (self.run.checkpoint(Stage.GROUPS), self.run.users.refresh, self.run.refreshed):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or not there
                self.run.users.work.rmdir()
            raise RunFolderError(
                f"{self.run.path}: has users of other tenants, whose adapters need the groups as they are"
            )

    def close(self) -> None:
        self.log.close()
        self.fitter.close()

    def grown(self, user: str) -> UserHistory:
        """Return a user's items."""
        return self.fitter.history(self.log, self.store.tenant, user)

    def held_out(self, items: Sequence[TextExample]) -> int:
        """Return how many of a user's newest items are held out."""
        return held_out_items(len(items), self.model.config.users.tiers.validation) if len(items) > 1 else 0

    def rows(self, left_out: Collection[str]) -> Rows:
        """Return the rows to train on: what was logged since the last refresh, and as many earlier ones."""
        seen = int(load_metadata(self.run.experts).get("logged", 0))
        new, old = list[TextExample](), list[TextExample]()
        for user in sorted({*self.users} - {*left_out}):
            items = self.grown(user).items
            for item in items[: len(items) - self.held_out(items)]:
                (new if -item.id > seen else old).append(item)
        seed = self.seed(max((-item.id for item in new), default=0))
        replayed = random.Random(seed).sample(old, min(len(old), len(new)))
        return Rows([*new, *replayed] if new else [], seed)

    def seed(self, logged: int) -> int:
        """Return the seed of a refresh with so many logged interactions."""
        return seed_of(self.fitter.seed, "refresh", str(logged)) % 2**32

    def train(self, rows: Rows) -> None:
        """Train stage 2 on; write the groups' tensors, and before them the embeddings."""
        config, model = self.model.config, self.model.model
        users = sorted({row.user for row in rows.examples})
        heads = [self.store.head(user) for user in users]
        start = torch.stack([head.embedding for head in heads if head is not None])
        # A checkpoint of other rows, as when more interactions have come after a kill, is of no use.
        state, metadata = self.run.users.refresh, {"rows": hash_value([[row.user, row.id] for row in rows.examples])}
        if not state.exists() or load_metadata(state)["rows"] != metadata["rows"]:
            self.run.checkpoint(Stage.GROUPS).unlink(missing_ok=True)
            save_tensors(state, {}, metadata)
        plan = stage_plan("groups", config, rows, model.backbone, self.model.encoder, self.run.path, rows.seed, no_log)
        with model.caching(self.run.path, config.compute.cache_mb):
            embeddings = train_groups(model, config.groups, users, plan, join_processes(config), start)
        everyone = {user: head.embedding for user, head, _ in self.store.heads()}
        everyone |= dict(zip(users, embeddings, strict=True))
        logged = max(-row.id for row in rows.examples)
        tensors = {**model.group_parameters(), "mean_embedding": torch.stack([*everyone.values()]).mean(0)}
        save_tensors(state, {"embeddings": embeddings}, {**metadata, "users": users})
        save_tensors(self.run.refreshed, tensors, {"modules": list(model.layers), "logged": logged})
        self.run.checkpoint(Stage.GROUPS).unlink(missing_ok=True)

    def commit(self) -> int:
        """Validate all users under the new groups and put them in service; return how many could be validated.

        Users who are enrolled, updated or rolled back meanwhile are validated again: putting what was read before would
        undo that.
        """
        groups = self.model.model.group_parameters()
        old = {name: each.detach().clone() for name, each in groups.items()}
        new, _ = load_tensors(self.run.refreshed)
        found, metadata = load_tensors(self.run.users.refresh)
        embeddings = dict(zip(metadata["users"], found["embeddings"], strict=True))
        records, seen, measured = dict[str, UserRecord | None](), dict[str, int](), set[str]()
        while True:
            now = {user: head.version for user, head, _ in self.store.heads()}
            changed = [user for user, number in now.items() if seen.get(user) != number]
            held = {user: self._held(user) for user in changed}
            fill(groups, old, self.run.experts)
            before = self._losses_before(held)
            measured |= {*before}
            fill(groups, new, self.run.refreshed)
            with progress("validate users", len(changed)) as advance:
                for user in changed:
                    records[user] = self._revalidated(user, embeddings.get(user), held[user], before.get(user))
                    advance(1)
            seen |= now
            if self.put((record for record in records.values() if record is not None), seen):
                return len(measured)

    def _held(self, user: str) -> tuple[TextExample, ...]:
        items = self.grown(user).items
        return items[len(items) - self.held_out(items) :]

    def _losses_before(self, held: Mapping[str, tuple[TextExample, ...]]) -> dict[str, float]:
        """Return the held-out loss, under the loaded groups, of the users who have held-out items."""
        pairs = ((user, self.store.get(user)) for user, items in held.items() if items)
        return {user: self._loss(state_of(self.model, record), held[user]) for user, record in pairs if record}

    def _revalidated(
        self, user: str, embedding: Tensor | None, held: Sequence[TextExample], before: float | None
    ) -> UserRecord | None:
        """Return a user's version for the new groups; None for a user who was deleted meanwhile."""
        record, head = self.store.get(user, coded=True), self.store.head(user)
        decoded = self.store.get(user)
        if record is None or head is None or decoded is None:
            return None
        if embedding is not None:
            record, decoded = replace(record, embedding=embedding), replace(decoded, embedding=embedding)
        state, made = state_of(self.model, decoded), dict[str, Any](by=BY, of=head.version)
        if before is None:
            return replace(record, metadata={**record.metadata, MADE: made, "reason": "the groups were refreshed"})
        after = self._loss(state, held)
        reason = f"the groups were refreshed; loss on {len(held)} held-out items {before:.3f} -> {after:.3f}"
        if state.row is not None and not after <= before:
            made, state = {**made, "refit": True}, State(state.embedding)
            record = UserRecord(user, Tier.GROUPS, record.embedding, None, record.metadata)
        with own_bank(self.model):
            usual = Usual.of(per_item(self.model, state, self._encoded(held)))
        kept = {} if usual is None else {"usual": usual.metadata()}
        return replace(record, metadata={**record.metadata, **kept, MADE: made, "reason": reason})

    def go_back(self) -> None:
        """Put every user's version from before the last refresh in service."""
        done = False
        while not done:
            seen = dict[str, int]()
            done = self.put(versions_before(self.store, seen), seen)

    def put(self, records: Iterable[UserRecord], seen: Mapping[str, int]) -> bool:
        """Commit: bind the store to the new groups and add the users' versions, then move the files.

        Returns False, and changes nothing, if a user has another version than in `seen`.
        """
        with self.log.queue.lock():  # no fit ends in between
            self._require_one_tenant()  # the first one may have come since
            try:
                self.store.put(records, bound={"groups": hash_file(self.run.refreshed)}, seen=seen)
            except ChangedError:
                return False
        settle_groups(self.run, self.store)
        return True

    def _loss(self, state: State, items: Sequence[TextExample]) -> float:
        with own_bank(self.model):
            totals, tokens = losses_of(self.model, state, self._encoded(items))
        return float(totals.sum() / tokens.sum())

    def _encoded(self, items: Sequence[TextExample]) -> list[EncodedExample]:
        return [self.model.encoder.encode(item) for item in items]
