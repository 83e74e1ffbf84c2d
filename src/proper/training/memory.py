"""Memory model of stage 3a: a formula for its footprint, and the number of bank slots (`slots: auto`) from it.

    bytes = weights + S * P * (5 * 4 + batch_size * c) + M * per_token + pending

S slots of P numbers each: values, gradients, two moments and the best values so far, in fp32; and for each of a user's
`batch_size` rows a copy in the compute type (c bytes per number) that the backward pass needs. M tokens run through the
model at once. `per_token` counts the activations that the backward pass needs (`models.memory.token_bytes`). `pending`
are finished adapters that wait for the next checkpoint. tests/training/test_memory.py compares the formula with torch's
allocations.

Memory is the device's total, not what is free at the moment: the same machine gives the same S.
"""

from __future__ import annotations

from dataclasses import dataclass

from proper.config import UsersConfig
from proper.layers.bank import AdapterBank
from proper.models.memory import token_bytes
from proper.models.personal import ProperModel
from proper.training.microbatching import MICRO_TOKENS

MEMORY_SHARE = 0.6
"""Share of the device's memory that stage 3 uses."""

MAX_SLOTS = {"cpu": 32, "cuda": 256}
"""Maximum number of slots: with more, a step's rows already saturate the device."""

PENDING_BYTES = 1 << 29
"""Bytes of finished adapters that may wait in memory for a checkpoint; at least one adapter per slot may."""


@dataclass(frozen=True)
class Footprint:
    """The memory of stage 3a by part, in bytes.

    Attributes:
        weights: backbone, experts and routers.
        slot: one slot of the bank, that is one user in training.
        activations: activations of `MICRO_TOKENS` tokens.
        pending: finished adapters, on the host.
    """

    weights: int
    slot: int
    activations: int
    pending: int

    def total(self, slots: int) -> int:
        """Return the total for this many slots."""
        return self.weights + slots * self.slot + self.activations + max(self.pending, slots * self.slot // 5)


def footprint(model: ProperModel, config: UsersConfig, longest: int, tokens: int = MICRO_TOKENS) -> Footprint:
    """Return the footprint of a model for rows of at most `longest` tokens."""
    network = model.backbone.model
    compute = network.dtype.itemsize
    width = model.user_layout(config).width
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    per_token = token_bytes(network.config.get_text_config(), compute, longest)
    slot = width * (5 * max(4, compute) + config.batch_size * compute)
    return Footprint(weights, slot, max(tokens, longest) * per_token, PENDING_BYTES)


def auto_slots(parts: Footprint, memory: int, device: str) -> int:
    """Return how many slots fit in `MEMORY_SHARE` of `memory` bytes: at least one, at most `MAX_SLOTS`."""
    most = MAX_SLOTS.get(device, MAX_SLOTS["cpu"])
    fitting = [slots for slots in range(1, most + 1) if parts.total(slots) <= memory * MEMORY_SHARE]
    return fitting[-1] if fitting else 1


def pending_rows(bank: AdapterBank) -> int:
    """Return how many finished adapters may wait for a checkpoint."""
    return max(bank.slots, PENDING_BYTES // (bank.layout.width * bank.values.element_size()))
