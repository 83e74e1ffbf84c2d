"""A run's model below the engine: the backbone with its adapted layers, and the state of each row's user.

A user is answered at the highest tier that they and the loaded stages have:

    NONE    group model with the mean user embedding     (an unknown user)
    GROUPS  group model with the user's embedding
    USERS   the same with the user's LoRA adapter
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.serialization import require_sound
from proper.adapters.slot_cache import AdapterKey, SlotCache
from proper.adapters.store import AdapterStore, Head
from proper.config import Config
from proper.data.encoder import Encoder
from proper.data.item_evidence import neutral
from proper.data.rows import Template, parse_template
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel
from proper.run_folder import Tier


class BatchModel(Protocol):
    """Interface of a model for scoring: it computes batches in which every row has its own user."""

    @property
    def model(self) -> ProperModel: ...  # noqa: D102
    @property
    def encoder(self) -> Encoder: ...  # noqa: D102
    @property
    def config(self) -> Config: ...  # noqa: D102

    def tier(self, user: str | None) -> Tier:
        """Return the tier that answers this user."""
        ...

    def rows(self, users: Sequence[str | None], task: int = 0) -> RowContext:
        """Return the row context of a batch of these users; `task` is the number of the rows' task."""
        ...


class ServedUsers:
    """The users that a model serves: their records in the tenants' stores and their adapters in bank slots.

    Attributes:
        store: the adapter store of the default tenant.
        mean: the mean user embedding (D,), for users that the store does not know.
        groups: hash of the loaded groups; None if it is not known.
        cache: the slot cache over the stores and the model's bank.
    """

    def __init__(
        self, store: AdapterStore, bank: AdapterBank, mean: Float[Tensor, "D"], groups: str | None = None
    ) -> None:
        self.store, self.mean, self.groups = store, mean, groups
        self.cache = SlotCache(self.store_of, bank)
        self._stores = {store.tenant: store}
        self._lock = threading.Lock()

    @property
    def bank(self) -> AdapterBank:
        """The bank whose slots hold the adapters."""
        return self.cache.bank

    def store_of(self, tenant: str) -> AdapterStore:
        """Return a tenant's store, which the first call opens; thread-safe."""
        with self._lock:
            if tenant not in self._stores:
                self._stores[tenant] = AdapterStore(self.store.folder, tenant)
            return self._stores[tenant]

    @property
    def outdated(self) -> bool:
        """Whether the groups were refreshed since they were loaded, so that the run has to be loaded again."""
        return self.groups is not None and self.store.manifest.metadata().get("groups", self.groups) != self.groups

    def head(self, user: str | None) -> Head | None:
        """Return a user's current record without the adapter; None for no user or an unknown one."""
        return None if user is None else self.store.head(user)

    def tier(self, user: str | None) -> Tier:
        """Return USERS, GROUPS, or NONE for a user that the store does not know."""
        head = self.head(user)
        return head.tier if head is not None else Tier.NONE

    def embeddings(self, users: Sequence[str | None]) -> Float[Tensor, "B D"]:
        """Return every row's user embedding; the mean for unknown users.

        Raises:
            StoreError: an embedding has numbers that are not finite or absurdly large.
        """
        heads = [self.head(user) for user in users]
        for user, head in zip(users, heads, strict=True):
            if user is not None and head is not None:
                require_sound(user, {"embedding": head.embedding})
        return torch.stack([head.embedding if head is not None else self.mean for head in heads])

    def slots(self, users: Sequence[str | None]) -> list[int]:
        """Load these users' adapters into the bank and return every row's slot; -1 for rows without an adapter.

        Raises:
            StoreError: the batch has more different users than the bank has slots, or an adapter is damaged.
        """
        tenant = self.store.tenant
        keys = {user: AdapterKey.of(tenant, user, self.head(user)) for user in set(users) if user is not None}
        return self.cache.fetch([None if user is None else keys[user] for user in users])

    def close(self) -> None:
        """End the loading thread and close the stores."""
        self.cache.close()
        for store in self._stores.values():
            store.close()


class PersonalizedModel:
    """A backbone with the population LoRA, the group experts and the users' adapters from a store.

    Attributes:
        model: backbone and adapted layers.
        encoder: encoder from texts to tokens.
        stage: the last stage that is applied.
        served: the users with their own embedding or adapter; None before stage 2.
        template: the prompt template of the run's data; with several tasks, of the first one's.
    """

    def __init__(
        self, model: ProperModel, encoder: Encoder, config: Config, served: ServedUsers | None, stage: Tier
    ) -> None:
        self.model, self.encoder, self.config, self.served, self.stage = model, encoder, config, served, stage
        self.template = self.template_of(None)

    def template_of(self, task: str | None) -> Template:
        """Return the prompt template of a task, by name; of the first or only one for None.

        Raises:
            ConfigError: the run has no such task.
        """
        own = list(self.config.each_task.values())[self.config.task_number(task)]
        return neutral(parse_template(own.data.prompt, "data.prompt"))

    @property
    def store(self) -> AdapterStore | None:
        """The adapter store; None before stage 2."""
        return None if self.served is None else self.served.store

    def tier(self, user: str | None) -> Tier:
        """Return the tier that answers this user."""
        if self.served is None or self.stage in (Tier.BASE, Tier.POPULATION):
            return self.stage
        tier = self.served.tier(user)
        return Tier.GROUPS if self.stage == Tier.GROUPS and tier == Tier.USERS else tier

    def rows(self, users: Sequence[str | None], task: int = 0) -> RowContext:
        """Return the row context of a batch of these users, and load their adapters into the bank.

        `task` is the number of the task of all rows.

        Raises:
            StoreError: a user's adapter or embedding is damaged.
        """
        if self.served is None or self.stage in (Tier.BASE, Tier.POPULATION):
            return RowContext()
        embedding = self.served.embeddings(users).to(self.model.device)
        tasks = torch.full((len(users),), task, device=self.model.device)
        slots = self.served.slots(users) if self.stage == Tier.USERS else [-1]
        if max(slots) < 0:
            return RowContext("groups", embedding=embedding, tasks=tasks)
        own = torch.tensor(slots, device=self.model.device)
        return RowContext("users", embedding=embedding, slots=own, tasks=tasks)

    def close(self) -> None:
        """Close the stores."""
        if self.served is not None:
            self.served.close()
