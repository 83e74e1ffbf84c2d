"""What the store keeps of a user, as its callers see it. Knows nothing about how it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Tier = Literal["groups", "users"]


@dataclass(frozen=True)
class UserRecord:
    """One user's own state.

    Attributes:
        user: any string.
        tier: "groups" (embedding only) or "users" (embedding and adapter).
        embedding: e_u (D,), fp32.
        adapter: stacked tensors, as `layers.bank.Layout` names them, or what `quantize.encode` made of them; None on
            the group tier.
        facts: JSON-able facts about how it came about.
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
        version: grows with every change of this user, a rollback included; starts again after a delete.
        checksum: of the adapter's bytes; None without one.
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
        bytes: of adapter and embedding.
        written: when, in whole seconds of Unix time.
        checksum: xxh3 of the adapter's bytes; two versions with the same one hold the same adapter.
    """

    version: int
    parent: int | None
    tier: Tier
    bytes: int
    written: int
    checksum: str | None
    facts: dict[str, Any]
