"""The derived method `users-int8`: a run's model with its users' adapters quantized as by `users.storage: int8`.

The stored adapters are quantized again, so that both forms share the same training. If they are stored in bf16, the
losses of both roundings are measured together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from proper.adapters.quantization import encode
from proper.adapters.store import AdapterStore, UserRecord
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel, ServedUsers
from proper.layers.bank import AdapterBank
from proper.run_folder import Tier

USERS_INT8 = "users-int8"


@contextmanager
def in_int8(folder: Path, users: Sequence[str]) -> Iterator[PersonalizedModel]:
    """Yield a run's model with these users' adapters in int8; all other users are unknown to it.

    The adapters are in a separate store in a temporary folder, which is removed at the end: no copy of personal data
    remains where deletion would miss it.

    Raises:
        RunFolderError: stage 3 is missing.
    """
    with tempfile.TemporaryDirectory(prefix="proper-int8-") as place:
        store, exact = AdapterStore(Path(place)), load(folder, Tier.USERS)
        try:
            yield _recoded(exact, users, store)
        finally:
            exact.close()
            store.close()


def int8_bytes(record: UserRecord) -> int:
    """Return the size of one user's adapter in int8 in bytes, scales included; 0 without an adapter."""
    return sum(tensor.nbytes for tensor in encode(record.adapter or {}, "int8").values())


def _recoded(exact: PersonalizedModel, users: Sequence[str], store: AdapterStore) -> PersonalizedModel:
    assert exact.served is not None
    source, held = exact.served.store, exact.served.bank
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
        # As in a run with `storage: int8`: dequantized values (number times scale) are not exact in bf16.
        dtype=torch.float32,
    )
    exact.model.use_bank(bank)
    served = ServedUsers(store, bank, exact.served.mean)
    return PersonalizedModel(exact.model, exact.encoder, exact.config, served, Tier.USERS)
