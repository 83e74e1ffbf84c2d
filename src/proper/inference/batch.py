"""The rows that run: whose they are, their keys and values, and the next token of each.

Knows nothing about who waits, how adapters get into their slots, or when a row has enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from proper.inference.guests import Guest
from proper.inference.kv import RowCache
from proper.inference.passes import columns_left, decode, prefill, rows_of
from proper.inference.prefixes import Prefix, Prefixes
from proper.inference.requests import Token
from proper.inference.sampling import logprobs_of, next_tokens
from proper.layers.routing import Rows

if TYPE_CHECKING:
    from proper.inference.personalized import PersonalizedModel


class Batch:
    """Up to `rows` rows of up to `limit` tokens; what ends and what begins goes through `prefixes`.

    Attributes:
        guests: whose the rows are. The last ones may be new: their prompts are not computed yet.
        reused: tokens of prompts that came from prefixes so far.
    """

    def __init__(self, model: PersonalizedModel, rows: int, limit: int, prefixes: Prefixes) -> None:
        self.guests: list[Guest] = []
        self.reused = 0
        self._model, self._cache, self._prefixes = model, RowCache(rows, limit), prefixes
        self._routing: Rows | None = None

    def __len__(self) -> int:
        return len(self.guests)

    def prefill(self, count: int) -> list[Token]:
        """Compute the prompts of the last `count` rows, and return each one's first token.

        Those that have a prefix come last, and in a pass of their own: the others' prompts would have it compute all.
        """
        new = [(guest, self._prefixes.find(guest.origin, guest.request.prompt)) for guest in self.guests[-count:]]
        whole = [guest for guest, prefix in new if prefix is None]
        begun = [(guest, prefix) for guest, prefix in new if prefix is not None]
        self.guests[-count:] = [*whole, *(guest for guest, _ in begun)]
        self._routing = None
        tokens = self._compute(whole, None) if whole else []
        if begun:
            guests, prefixes = zip(*begun, strict=True)
            tokens += self._compute(guests, prefixes)
        return tokens

    def decode(self) -> list[Token]:
        """Return the next token of every row."""
        if self._routing is None:
            self._routing = self._rows_of(self.guests)
        last = [guest.said[-1] for guest in self.guests]
        return self._draw(decode(self._model.model, self._cache, last, self._routing), self.guests)

    def leave(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        guest = self.guests[row]
        if guest.origin is not None:
            # The newest token is not in the row: it would have gone in with the next step.
            tokens = (*guest.request.prompt, *guest.said)[: self._cache.window.lengths[row]]
            self._prefixes.keep(guest.origin, tokens, self._cache.states(row))
        self._cache.leave(row)
        self.guests[row] = self.guests[-1]
        self.guests.pop()
        self._routing = None

    def clear(self) -> list[Guest]:
        """Drop all rows, and return whose they were."""
        guests, self.guests = self.guests, []
        self._cache.clear()
        self._routing = None
        return guests

    def _compute(self, guests: Sequence[Guest], prefixes: Sequence[Prefix] | None) -> list[Token]:
        """Compute some of the new rows' prompts."""
        prompts = [guest.request.prompt for guest in guests]
        if prefixes is not None:
            width = columns_left(prompts, prefixes)
            self.reused += sum(max(0, len(prompt) - width) for prompt in prompts)
        logits = prefill(self._model.model, self._cache, prompts, self._rows_of(guests), prefixes)
        return self._draw(logits, guests)

    def _rows_of(self, guests: Sequence[Guest]) -> Rows:
        return rows_of(
            self._model,
            [guest.head for guest in guests],
            [guest.slot for guest in guests],
            [guest.grouped for guest in guests],
            any(guest.request.gates for guest in guests),
        )

    def _draw(self, logits: Float[Tensor, "B V"], guests: Sequence[Guest]) -> list[Token]:
        tokens = next_tokens(logits, [guest.sampler for guest in guests])
        gates = self._model.model.routing.last()
        told = gates.tolist() if gates is not None else [()] * len(guests)
        drawn = []
        for row, (token, guest, one) in enumerate(zip(tokens, guests, told, strict=True)):
            own = tuple(one) if guest.request.gates and guest.grouped and one else None
            count = guest.request.alternatives
            drawn.append(Token(token, own, None if count is None else logprobs_of(logits[row], token, count)))
        return drawn
