"""`users-int8` as a model: a run's users answered from their adapters as `users.storage: int8` would keep them.

What stands in the store is encoded once more, so that both forms answer with the same training; from adapters kept in
bf16 the loss of both roundings is measured together. Knows nothing about metrics.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from proper.adapters.quantization import encode
from proper.adapters.slot_cache import SlotCache
from proper.adapters.store import AdapterStore, UserRecord
from proper.inference.personalized import PersonalizedModel, load
from proper.layers.bank import AdapterBank

USERS_INT8 = "users-int8"


@contextmanager
def in_int8(folder: Path, users: Sequence[str]) -> Iterator[PersonalizedModel]:
    """Yield the model of a run that answers these users with their adapters in int8; all others are unknown to it.

    They lie in a store of their own, in a temporary folder that is gone afterwards: personal data is copied nowhere
    that deletion would miss.

    Raises:
        RunFolderError: stage 3 is not there.
    """
    with tempfile.TemporaryDirectory(prefix="proper-int8-") as place:
        store, exact = AdapterStore(Path(place)), load(folder, "users")
        try:
            yield _recoded(exact, users, store)
        finally:
            exact.close()
            store.close()


def int8_bytes(record: UserRecord) -> int:
    """Return the bytes of one user's adapter in int8, scales included; 0 without one."""
    return sum(tensor.nbytes for tensor in encode(record.adapter or {}, "int8").values())


def _recoded(exact: PersonalizedModel, users: Sequence[str], store: AdapterStore) -> PersonalizedModel:
    assert exact.cache is not None and exact.cache.bank is not None
    source, held = exact.cache.store, exact.cache.bank
    records = (record for user in users if (record := source.get(user)) is not None)
    store.put(
        replace(record, adapter=None if record.adapter is None else encode(record.adapter, "int8"))
        for record in records
    )
    bank = AdapterBank(
        held.layout,
        held.slots,
        alpha=exact.config.users.alpha,
        trainable=False,
        device=exact.model.device,
        # As a run with `storage: int8` has it: the products of numbers and scales fit no bf16.
        dtype=torch.float32,
    )
    exact.model.use_bank(bank)
    cache = SlotCache(store, bank, exact.cache.mean)
    return PersonalizedModel(exact.model, exact.encoder, exact.config, cache, "users")
