"""Running batch of the engine: the rows in progress, their KV cache, prefill, and one decoding step for all rows.

When a forward pass over several rows fails, each row is computed alone, so that only the faulty row's request fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from proper.errors import ProperError
from proper.inference.forward import columns_left, decode, prefill, rows_of
from proper.inference.kv_cache import RowCache
from proper.inference.model import PersonalizedModel
from proper.inference.prefix_cache import CachedPrefix, PrefixCache
from proper.inference.requests import RunningRequest, Token
from proper.inference.sampling import logprobs_of, next_tokens
from proper.layers.batch_context import RowContext

Drawn = Token | Exception
"""A row's next token, or the error that prevented it."""

New = tuple[RunningRequest, CachedPrefix | None]
"""A request to prefill, and its cached prefix if there is one."""


class RunningBatch:
    """Up to `rows` rows of up to `limit` tokens; `prefixes` gives new rows their cached prefix and keeps ended rows.

    Attributes:
        guests: the request of each row, in row order.
        reused: number of prompt tokens taken from the prefix cache so far.
    """

    def __init__(self, model: PersonalizedModel, rows: int, limit: int, prefixes: PrefixCache) -> None:
        self.guests: list[RunningRequest] = []
        self.reused = 0
        self._model, self._cache, self._prefixes = model, RowCache(rows, limit), prefixes
        self._routing: RowContext | None = None

    def __len__(self) -> int:
        return len(self.guests)

    def prefill(self, guests: Sequence[RunningRequest]) -> tuple[list[Drawn], list[tuple[RunningRequest, Exception]]]:
        """Compute the prompts of new requests and append their rows; the row order may differ from `guests`.

        Requests with a cached prefix are computed last, in a separate pass: in one pass with prompts that have no
        prefix, their whole prompts would be computed.

        Returns:
            The first token of each added row, and the failed requests with their errors.
        """
        new = [(guest, self._prefixes.find(guest.origin, guest.request.prompt)) for guest in guests]
        drawn: list[Drawn] = []
        failed: list[tuple[RunningRequest, Exception]] = []
        for part in ([one for one in new if one[1] is None], [one for one in new if one[1] is not None]):
            if part:
                self._begin(part, drawn, failed)
        return drawn, failed

    def decode(self) -> list[Drawn]:
        """Return the next token of every row."""
        # Not caught: an interrupted move corrupts all rows, so the error must not be charged to a single row.
        self._cache.make_room()
        last = [guest.said[-1] for guest in self.guests]
        logits: Tensor | None = None
        with suppress(Exception):  # recomputing row by row finds the error again, after this pass's memory is free
            if self._routing is None:
                self._routing = self._rows_of(self.guests)
            logits = decode(self._model.model, self._cache, last, self._routing)
        return self._decode_alone(last) if logits is None else self._draw(logits, self.guests)

    def leave(self, row: int) -> None:
        """Remove a row; the last row moves to its index."""
        self._cache.leave(row)
        self.guests[row] = self.guests[-1]
        self.guests.pop()
        self._routing = None

    def keep(self, row: int) -> None:
        """Put a row's keys and values into the prefix cache, if its request has an origin."""
        guest = self.guests[row]
        if guest.origin is not None:
            # The newest token has no keys and values yet: the next step would have computed them.
            tokens = (*guest.request.prompt, *guest.said)[: self._cache.window.lengths[row]]
            self._prefixes.keep(guest.origin, tokens, self._cache.states(row))

    def require_backbone(self) -> None:
        """Check that the backbone alone, without experts and adapters, still gives finite logits.

        Raises:
            ProperError: it fails or its logits are not finite, so that no row can be computed.
        """
        model = self._model.model
        try:
            logits: Tensor = model.backbone.model(torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits
            works = bool(logits.amax().isfinite())
        except Exception as error:
            raise ProperError(f"the backbone does not compute any more: {type(error).__name__}: {error}") from error
        if not works:
            raise ProperError("the backbone does not compute any more: its logits are not finite")

    def _begin(self, part: Sequence[New], drawn: list[Drawn], failed: list[tuple[RunningRequest, Exception]]) -> None:
        """Prefill new rows in one pass, or each alone if that fails."""
        try:
            drawn += self._compute(part)
            return
        except Exception as error:
            if len(part) == 1:
                failed.append((part[0][0], error))
        # Not inside `except`, where the error's traceback would keep the failed pass's memory alive.
        for one in part if len(part) > 1 else ():
            self._begin([one], drawn, failed)

    def _compute(self, part: Sequence[New]) -> list[Drawn]:
        guests = [guest for guest, _ in part]
        prompts = [guest.request.prompt for guest in guests]
        prefixes = [prefix for _, prefix in part if prefix is not None] or None
        logits = prefill(self._model.model, self._cache, prompts, self._rows_of(guests), prefixes)
        if prefixes is not None:
            width = columns_left(prompts, prefixes)
            self.reused += sum(max(0, len(prompt) - width) for prompt in prompts)
        self.guests += guests
        self._routing = None
        return self._draw(logits, guests)

    def _decode_alone(self, last: Sequence[int]) -> list[Drawn]:
        """Decode row by row: the failed pass did not advance the window, and its writes are overwritten."""
        drawn: list[Drawn] = []
        for row, guest in enumerate(self.guests):
            try:
                rows = self._rows_of([guest])
                logits = decode(self._model.model, self._cache.alone(row), last[row : row + 1], rows)
                drawn += self._draw(logits, [guest])
            except Exception as error:
                drawn.append(error)
        self._cache.advance()
        return drawn

    def _rows_of(self, guests: Sequence[RunningRequest]) -> RowContext:
        return rows_of(
            self._model,
            [guest.head for guest in guests],
            [guest.slot for guest in guests],
            [guest.grouped for guest in guests],
            any(guest.request.gates for guest in guests),
        )

    def _draw(self, logits: Float[Tensor, "B V"], guests: Sequence[RunningRequest]) -> list[Drawn]:
        """Sample the next tokens of rows in the cache. Returns errors instead of raising: the step cannot be redone."""
        try:
            tokens = next_tokens(logits, [guest.sampler for guest in guests])
            gates = self._model.model.routing.last()
            told = gates.tolist() if gates is not None else [()] * len(guests)
        except Exception as error:
            return [error] * len(guests)
        return [
            token if isinstance(token, Exception) else _token(token, guest, tuple(one), logits[row])
            for row, (token, guest, one) in enumerate(zip(tokens, guests, told, strict=True))
        ]


def _token(token: int, guest: RunningRequest, gates: tuple[float, ...], logits: Float[Tensor, "V"]) -> Token:
    own = gates if guest.request.gates and guest.grouped and gates else None
    count = guest.request.alternatives
    return Token(token, own, None if count is None else logprobs_of(logits, token, count))
