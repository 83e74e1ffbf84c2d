"""The derived method `static-export`: every target user answered with their folded plain LoRA, in mixed-user batches.

Proper's own layers do what another server would do with the exported adapters: a bank of the folded rank on the merged
backbone, without experts and routers. A user without a history has no gates to average, and is answered by the merged
backbone alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from proper.adapters.store import AdapterStore, UserRecord
from proper.console import progress
from proper.data.dataset import Dataset, TextExample
from proper.export.fold import fold, folded_rank
from proper.export.peft_format import pack, served_rank
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel, ServedUsers
from proper.layers.bank import AdapterBank
from proper.models.personal import ProperModel
from proper.run_folder import Tier

STATIC_EXPORT = "static-export"


@contextmanager
def static_export(folder: Path, dataset: Dataset) -> Iterator[PersonalizedModel]:
    """Fold all target users of a run and yield the model that answers with the folded adapters.

    The adapters are in a separate store in a temporary folder, which is removed at the end: no copy of personal data
    remains where deletion would miss it.

    Raises:
        RunFolderError: stage 3 is missing.
    """
    with tempfile.TemporaryDirectory(prefix="proper-static-") as place:
        store = AdapterStore(Path(place))
        exact = load(folder, Tier.USERS)
        try:
            users = [user.id for user in dataset.users("target") if user.history > 0]
            yield fold_all(exact, users, lambda user: dataset.history(user, exact.config.users.max_items), store)
        finally:
            exact.close()
            store.close()


def folded_size(model: PersonalizedModel) -> tuple[int, int]:
    """Return the parameters and bytes of one user's exported adapter: fp32, at a rank that servers accept."""
    numbers = model.model.layout(served_rank(folded_rank(model))).width
    return numbers, 4 * numbers


def fold_all(
    exact: PersonalizedModel, users: Sequence[str], history: Callable[[str], Sequence[TextExample]], store: AdapterStore
) -> PersonalizedModel:
    """Fold these users into an empty store and return the model over it; `exact` loses its backbone and is unusable.

    Raises:
        InputError: a user has no history.
    """
    config, rank = exact.config, folded_rank(exact)
    layout = exact.model.layout(rank)
    nobody = torch.zeros(1)  # A record must have an embedding, but plain LoRAs do not use it.
    with progress(f"fold: {STATIC_EXPORT}", len(users)) as advance:
        for user in users:
            adapter = layout.unpack(pack(fold(exact, user, history(user)).loras, layout))
            store.put([UserRecord(user, Tier.USERS, nobody, adapter)])
            advance(1)
    # The same backbone without experts: plain layers replace the adapted ones in place.
    plain = ProperModel(exact.model.backbone)
    plain.add_plain_targets(config.users, list(exact.model.layers))
    bank = AdapterBank(
        layout, max(2, config.compute.batch_size), alpha=float(rank), trainable=False, device=exact.model.device
    )
    plain.use_bank(bank)
    return PersonalizedModel(plain, exact.encoder, config, ServedUsers(store, bank, nobody), Tier.USERS)
