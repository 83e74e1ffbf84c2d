"""Offline batch generation: continues a list of token prompts with an engine that exists for the call only.

The batches depend on the list only, never on how fast adapters load, so the same call gives bit-identical results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proper.inference.engine import Engine
from proper.inference.requests import EngineLimits, Event, Request, Started, Token
from proper.inference.sampling import Sampling

if TYPE_CHECKING:
    from proper.inference.personalized import PersonalizedModel


@dataclass
class Continuation:
    """Generated continuation of one prompt; it is the request's event sink.

    Attributes:
        tokens: token ids without the end token.
        tier: the tier that answered.
    """

    tokens: list[int] = field(default_factory=list)
    tier: str = ""

    def __call__(self, event: Event) -> None:
        """Receive an event of the engine."""
        if isinstance(event, Started):
            self.tier = event.tier
        elif isinstance(event, Token):
            self.tokens.append(event.id)


def generate(
    model: PersonalizedModel, prompts: Sequence[Sequence[int]], users: Sequence[str | None], sampling: Sampling
) -> list[Continuation]:
    """Continue each prompt for its user until the end token or `max_new_tokens`, `compute.batch_size` rows at a time.

    Every prompt has its own generator seeded with `sampling.seed`: its answer does not depend on the other prompts, and
    a repeated prompt of the same user gets the same answer.

    Raises:
        StoreError: a user's adapter is damaged.
    """
    if not prompts:
        return []
    found = [Continuation() for _ in prompts]
    engine = Engine(model, _limits(model, prompts, sampling.max_new_tokens), strict=True)
    try:
        # Prompts of similar length run together: every row costs as much as the longest one.
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
    # The size of the model's own bank, so that it is reused: a second bank would need as much memory again.
    slots = bank.slots if bank is not None else None
    # No prefix cache: it would make the results' bits depend on earlier requests.
    return EngineLimits(rows, slots, prefill=rows * longest, length=longest + room, prefix_bytes=0)
