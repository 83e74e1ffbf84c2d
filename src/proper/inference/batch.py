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
from proper.inference.requests import RequestHandle, Token
from proper.inference.sampling import logprobs_of, next_tokens
from proper.layers.batch_context import RowContext

NextToken = Token | Exception
"""A row's next token, or the error that prevented it."""

New = tuple[RequestHandle, CachedPrefix | None]
"""A request to prefill, and its cached prefix if there is one."""

Failed = tuple[RequestHandle, Exception]
"""A request that could not be prefilled, and its error."""


class RunningBatch:
    """Up to `rows` rows of up to `limit` tokens; `prefixes` gives new rows their cached prefix and keeps ended rows.

    Attributes:
        handles: the request of each row, in row order.
        reused: number of prompt tokens taken from the prefix cache so far.
    """

    def __init__(self, model: PersonalizedModel, rows: int, limit: int, prefixes: PrefixCache) -> None:
        self.handles: list[RequestHandle] = []
        self.reused = 0
        self._model, self._cache, self._prefixes = model, RowCache(rows, limit), prefixes
        self._routing: RowContext | None = None

    def __len__(self) -> int:
        return len(self.handles)

    def prefill(self, handles: Sequence[RequestHandle]) -> tuple[list[NextToken], list[Failed]]:
        """Compute the prompts of new requests and append their rows; the row order may differ from `handles`.

        Requests with a cached prefix are computed last, in a separate pass: in one pass with prompts that have no
        prefix, their whole prompts would be computed.

        Returns:
            The first token of each added row, and the failed requests with their errors.
        """
        new = [(handle, self._prefixes.find(handle.prefix_key, handle.request.prompt)) for handle in handles]
        tokens: list[NextToken] = []
        failed: list[Failed] = []
        for part in ([one for one in new if one[1] is None], [one for one in new if one[1] is not None]):
            if part:
                self._begin(part, tokens, failed)
        return tokens, failed

    def decode(self) -> list[NextToken]:
        """Return the next token of every row."""
        # Not caught: an interrupted move corrupts all rows, so the error must not be charged to a single row.
        self._cache.make_room()
        last = [handle.tokens[-1] for handle in self.handles]
        logits: Tensor | None = None
        with suppress(Exception):  # recomputing row by row finds the error again, after this pass's memory is free
            if self._routing is None:
                self._routing = self._rows_of(self.handles)
            logits = decode(self._model.model, self._cache, last, self._routing)
        return self._decode_alone(last) if logits is None else self._draw(logits, self.handles)

    def leave(self, row: int) -> None:
        """Remove a row; the last row moves to its index."""
        self._cache.leave(row)
        self.handles[row] = self.handles[-1]
        self.handles.pop()
        self._routing = None

    def keep(self, row: int) -> None:
        """Put a row's keys and values into the prefix cache, if its request has a prefix key."""
        handle = self.handles[row]
        if handle.prefix_key is not None:
            # The newest token has no keys and values yet: the next step would have computed them.
            tokens = (*handle.request.prompt, *handle.tokens)[: self._cache.window.lengths[row]]
            self._prefixes.keep(handle.prefix_key, tokens, self._cache.states(row))

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
            raise ProperError(f"the backbone cannot compute any more: {type(error).__name__}: {error}") from error
        if not works:
            raise ProperError("the backbone cannot compute any more: its logits are not finite")

    def _begin(self, part: Sequence[New], tokens: list[NextToken], failed: list[Failed]) -> None:
        """Prefill new rows in one pass, or each alone if that fails."""
        try:
            tokens += self._compute(part)
            return
        except Exception as error:
            if len(part) == 1:
                failed.append((part[0][0], error))
        # Not inside `except`, where the error's traceback would keep the failed pass's memory alive.
        for one in part if len(part) > 1 else ():
            self._begin([one], tokens, failed)

    def _compute(self, part: Sequence[New]) -> list[NextToken]:
        handles = [handle for handle, _ in part]
        prompts = [handle.request.prompt for handle in handles]
        prefixes = [prefix for _, prefix in part if prefix is not None] or None
        logits = prefill(self._model.model, self._cache, prompts, self._rows_of(handles), prefixes)
        if prefixes is not None:
            width = columns_left(prompts, prefixes)
            self.reused += sum(max(0, len(prompt) - width) for prompt in prompts)
        self.handles += handles
        self._routing = None
        return self._draw(logits, handles)

    def _decode_alone(self, last: Sequence[int]) -> list[NextToken]:
        """Decode row by row: the failed pass did not advance the window, and its writes are overwritten."""
        tokens: list[NextToken] = []
        for row, handle in enumerate(self.handles):
            try:
                rows = self._rows_of([handle])
                logits = decode(self._model.model, self._cache.alone(row), last[row : row + 1], rows)
                tokens += self._draw(logits, [handle])
            except Exception as error:
                tokens.append(error)
        self._cache.advance()
        return tokens

    def _rows_of(self, handles: Sequence[RequestHandle]) -> RowContext:
        return rows_of(
            self._model,
            [handle.head for handle in handles],
            [handle.slot for handle in handles],
            [handle.uses_experts for handle in handles],
            any(handle.request.gates for handle in handles),
            [handle.request.task for handle in handles],
        )

    def _draw(self, logits: Float[Tensor, "B V"], handles: Sequence[RequestHandle]) -> list[NextToken]:
        """Sample the next tokens of rows in the cache. Returns errors instead of raising: the step cannot be redone."""
        try:
            tokens = next_tokens(logits, [handle.sampler for handle in handles])
            gates = self._model.model.routing.last()
            all_gates = gates.tolist() if gates is not None else [()] * len(handles)
        except Exception as error:
            return [error] * len(handles)
        return [
            token if isinstance(token, Exception) else _token(token, handle, tuple(one), logits[row])
            for row, (token, handle, one) in enumerate(zip(tokens, handles, all_gates, strict=True))
        ]


def _token(token: int, handle: RequestHandle, gates: tuple[float, ...], logits: Float[Tensor, "V"]) -> Token:
    own = gates if handle.request.gates and handle.uses_experts and gates else None
    count = handle.request.alternatives
    return Token(token, own, None if count is None else logprobs_of(logits, token, count))
