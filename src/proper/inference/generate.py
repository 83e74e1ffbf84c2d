"""Answers to a list of prompts: an engine that lives for the call, with room for what is asked and no more.

What runs together depends on the list only, never on how fast adapters load, so the same call gives the same bits.
Knows nothing about text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proper.inference.engine import Engine
from proper.inference.requests import Event, Request, Started, Token
from proper.inference.running import EngineLimits
from proper.inference.sampling import Sampling

if TYPE_CHECKING:
    from proper.inference.personalized import PersonalizedModel


@dataclass
class Continuation:
    """One prompt's answer.

    Attributes:
        tokens: without the end token.
        tier: which tier answered.
    """

    tokens: list[int] = field(default_factory=list)
    tier: str = ""

    def __call__(self, event: Event) -> None:
        """Hear from the engine."""
        if isinstance(event, Started):
            self.tier = event.tier
        elif isinstance(event, Token):
            self.tokens.append(event.id)


def generate(
    model: PersonalizedModel, prompts: Sequence[Sequence[int]], users: Sequence[str | None], sampling: Sampling
) -> list[Continuation]:
    """Continue each prompt for its user until its end token, `compute.batch_size` at a time.

    Every prompt draws from `sampling.seed` by itself: its answer does not depend on the others, and the same prompt
    of the same user twice gets the same answer twice.

    Raises:
        StoreError: a user's adapter is damaged.
    """
    if not prompts:
        return []
    found = [Continuation() for _ in prompts]
    engine = Engine(model, _limits(model, prompts, sampling.max_new_tokens), strict=True)
    try:
        # Prompts of similar length run together: what the longest row needs, all rows pay for.
        for at in sorted(range(len(prompts)), key=lambda at: len(prompts[at])):
            engine.submit(Request(tuple(prompts[at]), users[at], sampling=sampling), found[at])
        while not engine.idle:
            engine.step()
    finally:
        engine.close()
    return found


def _limits(model: PersonalizedModel, prompts: Sequence[Sequence[int]], room: int) -> EngineLimits:
    rows, longest = min(model.config.compute.batch_size, len(prompts)), max(map(len, prompts))
    bank = model.cache.bank if model.cache is not None else None
    # The model's own bank: a second one would take its memory again.
    slots = bank.slots if bank is not None else None
    # No prefixes: they would make bits depend on who was answered before.
    return EngineLimits(rows, slots, prefill=rows * longest, length=longest + room, prefix_bytes=0)
