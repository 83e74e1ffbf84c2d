"""A run's model with its users' adapters in another form, for the derived methods `users-int8` and `static-export`.

    users-int8      the stored adapters quantized again, as by `users.storage: int8`
    static-export   every user's folded plain LoRA, without experts and routers, as another server answers

Both share the training of the exact model, so a difference is the loss of the form. If the adapters are stored in bf16,
users-int8 measures the losses of both roundings together. For static-export, proper's own layers do what another server
would do with the exported adapters: a bank of the folded rank on the merged backbone. A user without a history has no
gates to average, and is answered by the merged backbone alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from proper.adapters.quantization import encode
from proper.adapters.store import AdapterStore, UserRecord
from proper.config import GroupsConfig
from proper.console import progress
from proper.data.dataset import Dataset
from proper.data.histories import TextExample
from proper.export.fold import fold, folded_rank
from proper.export.peft_format import pack, served_rank
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel, ServedUsers
from proper.layers.bank import AdapterBank
from proper.models.personal import ProperModel
from proper.run_folder import Tier

USERS_INT8 = "users-int8"
STATIC_EXPORT = "static-export"


@contextmanager
def in_int8(folder: Path, users: Sequence[str]) -> Iterator[PersonalizedModel]:
    """Yield a run's model with these users' adapters in int8; all other users are unknown to it.

    Raises:
        RunFolderError: stage 3 is missing.
    """
    with (
        temporary_store() as store,
        closing(load(folder, Tier.USERS)) as exact,
        closing(_quantize(exact, users, store)) as model,
    ):
        yield model


@contextmanager
def static_export(folder: Path, dataset: Dataset) -> Iterator[PersonalizedModel]:
    """Fold all target users of a run and yield the model that answers with the folded adapters.

    Raises:
        RunFolderError: stage 3 is missing.
    """
    with temporary_store() as store, closing(load(folder, Tier.USERS)) as exact:
        users = [user.id for user in dataset.users("target") if user.history > 0]
        newest = exact.config.users.max_items
        with closing(fold_all(exact, users, lambda user: dataset.history(user, newest), store)) as model:
            yield model


def int8_bytes(record: UserRecord) -> int:
    """Return the size of one user's adapter in int8 in bytes, scales included; 0 without an adapter."""
    return sum(tensor.nbytes for tensor in encode(record.adapter or {}, "int8").values())


def folded_size(model: PersonalizedModel) -> tuple[int, int]:
    """Return the parameters and bytes of one user's exported adapter: fp32, at a rank that servers accept."""
    numbers = model.model.layout(served_rank(folded_rank(model))).width
    return numbers, 4 * numbers


@contextmanager
def temporary_store() -> Iterator[AdapterStore]:
    """Yield an empty store in a temporary folder, which is removed at the end.

    No copy of personal data remains where deletion would miss it.
    """
    with tempfile.TemporaryDirectory(prefix="proper-export-") as folder, closing(AdapterStore(Path(folder))) as store:
        yield store


def _quantize(exact: PersonalizedModel, users: Sequence[str], store: AdapterStore) -> PersonalizedModel:
    assert exact.served is not None
    source, bank = exact.served.store, exact.served.bank
    records = (record for user in users if (record := source.get(user)) is not None)
    store.put(
        replace(record, adapter=None if record.adapter is None else encode(record.adapter, "int8"))
        for record in records
    )
    # As in a run with `storage: int8`: dequantized values (number times scale) are not exact in bf16.
    quantized = AdapterBank(
        bank.layout, bank.slots, alpha=exact.config.users.alpha, trainable=False, device=exact.model.device
    )
    exact.model.use_bank(quantized)
    served = ServedUsers(store, quantized, exact.served.mean)
    return PersonalizedModel(exact.model, exact.encoder, exact.config, served, Tier.USERS)


def fold_all(
    exact: PersonalizedModel, users: Sequence[str], history: Callable[[str], Sequence[TextExample]], store: AdapterStore
) -> PersonalizedModel:
    """Fold these users into an empty store and return the model over it; `exact` loses its backbone and is unusable.

    Raises:
        InputError: a user has no history.
    """
    config, rank = exact.config, folded_rank(exact)
    layout = exact.model.layout(rank)
    unused = torch.zeros(1)  # A record must have an embedding, but plain LoRAs do not use it.
    with progress(f"fold: {STATIC_EXPORT}", len(users)) as advance:
        for user in users:
            adapter = layout.unpack(pack(fold(exact, user, history(user)).loras, layout))
            store.put([UserRecord(user, Tier.USERS, unused, adapter)])
            advance(1)
    # The same backbone without experts: plain layers replace the adapted ones in place.
    plain = ProperModel(exact.model.backbone)
    plain.add_plain_targets(GroupsConfig(target_modules=list(exact.model.layers)))
    bank = AdapterBank(
        layout, max(2, config.compute.batch_size), alpha=float(rank), trainable=False, device=exact.model.device
    )
    plain.use_bank(bank)
    return PersonalizedModel(plain, exact.encoder, config, ServedUsers(store, bank, unused), Tier.USERS)
