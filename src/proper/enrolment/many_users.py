"""Enrols many users at once: embeddings are placed in one pass over all items, then all is fitted in common batches.

    place   log the interactions, place every embedding, store all records in one transaction
    fit     fit the embeddings, then the adapters, of `USERS_PER_BATCH` users at a time, into files from which
            their fits resume

The users then leave the fit queue one by one (`worker`), each with the record that is there. Every user gets what
they would get alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

from proper.adapters.store import AdapterStore
from proper.console import Bar
from proper.enrolment.fit_embedding import FittedEmbedding, fit_embeddings
from proper.enrolment.fit_files import load_embedding, same_history, save_embedding
from proper.enrolment.fit_user import Fitter, own_bank
from proper.enrolment.history import UserHistory
from proper.enrolment.place import embedding_jobs, placed_record
from proper.interactions.log import InteractionLog
from proper.interactions.personal_files import work_folder
from proper.run_folder import Tier
from proper.training.users import train_together

USERS_PER_BATCH = 256
"""Users who are fitted in one batch."""

Advance = Callable[[int], None]


def place_users(
    fitter: Fitter, store: AdapterStore, log: InteractionLog, users: Sequence[str], advance: Advance
) -> None:
    """Store the placed embeddings of new users, by one forward pass of their items; nothing without an encoder.

    Args:
        fitter: the loaded run.
        store: the tenant's store.
        log: has the users' interactions.
        users: users who are not in the store; those who are there by the end keep what they have.
        advance: called with the number of users done since its last call.

    Raises:
        ChangedError: the groups were refreshed since the run was loaded.
    """
    if fitter.placer.encoder is None:
        advance(len(users))
        return
    for some, histories in _histories(fitter, store, log, users):
        embeddings = fitter.placer.place([fitter.encoded(grown) for grown in histories])
        records = (
            placed_record(user, embedding, grown, fitter.placer.kind)
            for user, embedding, grown in zip(some, embeddings, histories, strict=True)
        )
        # A worker may have fitted a user meanwhile: the users are in its queue since they were enrolled.
        store.put(records, only_new=True, only_if_bound=fitter.bound)
        advance(len(some))


def fit_many(
    fitter: Fitter, store: AdapterStore, log: InteractionLog, users: Sequence[str], advance: Advance, bar: Bar
) -> None:
    """Fit the embeddings and adapters of new users; the users' fits, which are queued, go on from there.

    A user whose loss is not finite is left out: the user's own fit fails and says so.

    Args:
        fitter: the loaded run.
        store: the tenant's store.
        log: has the users' interactions.
        users: users who are in the fit queue.
        advance: called with the number of users whose embeddings are fitted since its last call.
        bar: shows the progress of the adapters, in two phases.
    """
    validation = fitter.model.config.users.tiers.validation
    for some, histories in _histories(fitter, store, log, users):
        folders = [work_folder(store.folder, store.tenant, user) for user in some]
        for folder, grown in zip(folders, histories, strict=True):
            same_history(folder, grown, fitter.groups)
        left = [at for at, folder in enumerate(folders) if load_embedding(folder) is None]
        jobs = embedding_jobs(fitter.placer, [(some[at], fitter.encoded(histories[at])) for at in left], validation)
        found = fit_embeddings(fitter.embedding_setting(lambda: None), jobs) if jobs else []
        for at, each in zip(left, found, strict=True):
            if isinstance(each, FittedEmbedding):
                save_embedding(folders[at], each)
        advance(len(some))
        if fitter.model.stage == Tier.USERS:
            _fit_adapters(fitter, store, some, histories, bar)


def _fit_adapters(
    fitter: Fitter, store: AdapterStore, users: Sequence[str], histories: Sequence[UserHistory], bar: Bar
) -> None:
    with ExitStack() as scratches, own_bank(fitter.model):
        stages = []
        for user, grown in zip(users, histories, strict=True):
            folder = work_folder(store.folder, store.tenant, user)
            found = load_embedding(folder)
            if found is not None:
                scratch = scratches.enter_context(closing(AdapterStore(folder / "final")))
                own = fitter.items(grown), found.embedding
                stages.append(fitter.user_stage(store, user, *own, folder, scratch))
        train_together(stages, bar)


def _histories(
    fitter: Fitter, store: AdapterStore, log: InteractionLog, users: Sequence[str]
) -> Iterator[tuple[list[str], list[UserHistory]]]:
    """Yield users who have items, `USERS_PER_BATCH` at a time, and their histories."""
    for at in range(0, len(users), USERS_PER_BATCH):
        pairs = [(user, fitter.history(log, store.tenant, user)) for user in users[at : at + USERS_PER_BATCH]]
        pairs = [(user, grown) for user, grown in pairs if grown.items]
        if pairs:
            yield [user for user, _ in pairs], [grown for _, grown in pairs]
