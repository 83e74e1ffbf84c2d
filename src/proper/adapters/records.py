"""Record types of the adapter store's API: a user's record, its head (without the adapter) and its versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from proper.run_folder import Tier


@dataclass(frozen=True)
class UserRecord:
    """One user's own state.

    Attributes:
        user: any string.
        tier: GROUPS (embedding only) or USERS (embedding and adapter).
        embedding: e_u (D,), fp32.
        adapter: stacked tensors, as `layers.bank.Layout` names them, or their `quantization.encode` form; None on the
            group tier.
        facts: JSON-serializable metadata about how the record was made.
    """

    user: str
    tier: Tier
    embedding: Tensor
    adapter: Mapping[str, Tensor] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """A user's current record without the adapter.

    Attributes:
        version: increases with every change of this user, a rollback included; starts again after a delete.
        checksum: xxh3 of the adapter's bytes; None without an adapter.
    """

    version: int
    tier: Tier
    embedding: Tensor
    checksum: bytes | None = None


@dataclass(frozen=True)
class Version:
    """One stored version of a user.

    Attributes:
        parent: the version that was current before; None for the first.
        bytes: size of adapter and embedding.
        written: time of writing, in whole seconds of Unix time.
        checksum: xxh3 of the adapter's bytes; two versions with equal checksums have the same adapter.
    """

    version: int
    parent: int | None
    tier: Tier
    bytes: int
    written: int
    checksum: str | None
    facts: dict[str, Any]
