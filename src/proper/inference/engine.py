"""Continuous-batching engine for mixed users: each step generates one token for every running row.

    step:  accept and cancel requests -> start adapter loads -> decode one token per row -> prefill requests whose
           adapters are loaded

New rows are prefilled together and join the running batch. Keys and values are personal: a row never reuses those of
another user, not even for the same prompt (`prefix_cache.py`). A request keeps one version of its user's adapter until
it ends. An error ends the request that caused it; if no request caused it, `step` raises and the engine has to be
closed. The engine works on tokens, not on text.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from proper.adapters.slot_cache import CacheCounts
from proper.adapters.store import AdapterStore
from proper.errors import ProperError
from proper.inference.adapter_manager import AdapterManager
from proper.inference.batch import NextToken, RunningBatch
from proper.inference.model import PersonalizedModel
from proper.inference.prefix_cache import PrefixCache
from proper.inference.request_queue import RequestQueue
from proper.inference.requests import EngineLimits, EngineStats, Event, Finished, Request, RequestHandle, Sink, Started


class Engine:
    """Engine of one model. Methods not marked thread-safe are for the thread that runs the steps.

    The engine fills the model's bank. Until `close`, neither generation and scoring with the model nor another engine
    may be used on it.

    Args:
        model: the model that answers.
        limits: batch, slot and memory limits; the defaults if None.
        strict: raise every error, damaged adapters included, from `step`. A server (not strict) fails only the request
            that the error belongs to.

    Attributes:
        limit: maximum tokens of a prompt and its answer together.
        changed: condition that is notified when a request, cancellation or load needs a step.
    """

    def __init__(self, model: PersonalizedModel, limits: EngineLimits | None = None, *, strict: bool = False) -> None:
        limits = limits or EngineLimits()
        self.model, self.limits, self.limit = model, limits, limits.length or model.config.compute.max_length
        positions = model.model.backbone.positions
        if positions is not None:
            self.limit = min(self.limit, positions)
        self._strict = strict
        self.changed = threading.Condition()
        self._adapters = AdapterManager(model, limits.bank, self.wake, strict)
        self._prefixes = PrefixCache(limits.prefix_bytes)
        self._inbox: deque[RequestHandle] = deque()
        self._tasks: deque[Callable[[], None]] = deque()
        self._queue: RequestQueue[RequestHandle] = RequestQueue(limits.patience, limits.flow_rows)
        self._batch = RunningBatch(model, limits.rows, self.limit, self._prefixes)
        self._open: dict[RequestHandle, None] = {}
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def submit(self, request: Request, sink: Sink) -> RequestHandle:
        """Queue a request and return its handle; the engine's thread calls `sink` with the events. Thread-safe.

        Raises:
            InputError: see `check`.
            ProperError: the engine is closed.
        """
        self.check(request)
        handle = RequestHandle(request, sink, self.wake)
        with self.changed:
            if self._closed:
                raise ProperError("the engine is closed")
            self._open[handle] = None
            self._inbox.append(handle)
            self.changed.notify_all()
        return handle

    def check(self, request: Request) -> None:
        """Check that a request can be computed; thread-safe. Raises InputError, see `Request.require_possible`."""
        request.require_possible(self.limit, self.model.model.backbone.embeddings)

    def forget(self, tenant: str, user: str) -> None:
        """Wipe a user's adapters from the bank once no row uses them, and drop the user's prefixes; thread-safe."""
        self._before_step(partial(self._forget_user, tenant, user))

    def recheck(self) -> None:
        """Forget all cached users who are not in their store: another process may have deleted them; thread-safe."""
        self._before_step(self._forget_deleted)

    def store(self, tenant: str) -> AdapterStore:
        """Return a tenant's store, which the first call opens; thread-safe.

        Raises:
            ProperError: the run has no users.
        """
        return self._adapters.store(tenant)

    def wake(self) -> None:
        """Notify the threads that wait on `changed`; thread-safe."""
        with self.changed:
            self.changed.notify_all()

    def settle(self) -> None:
        """Wait for all running loads, so that the next prefill depends on the requests only and not on timing."""
        with self.changed:
            self.changed.wait_for(lambda: self._adapters.settled)

    @property
    def idle(self) -> bool:
        """Whether every submitted request has finished."""
        return not self._open

    @property
    def blocked(self) -> bool:
        """Whether a step has nothing to do until a load ends or a request is submitted or cancelled."""
        adapters = self._adapters
        if len(self._batch) or self._inbox or self._tasks or adapters.finished:
            return False
        if len(self._queue) and not adapters.loading:
            return False  # a row that ended with its first token has freed the slot or row that these requests need
        return not any(handle.cancelled or adapters.ready(handle) for handle in self._queue.items())

    def stats(self) -> EngineStats:
        """Return a snapshot of the engine's figures; thread-safe."""
        cache, counts = self._adapters.cache, self._counts
        return EngineStats(
            waiting=len(self._queue) + len(self._inbox),
            running=len(self._batch),
            slots=0 if cache is None else cache.bank.slots,
            resident=0 if cache is None else len(cache),
            pinned=0 if cache is None else cache.pinned,
            loading=self._adapters.loading,
            prefix_bytes=self._prefixes.bytes,
            steps=counts["steps"],
            prompt_tokens=counts["prompt"],
            reused_tokens=self._batch.reused,
            tokens=dict(self._tokens),
            fallbacks=self._adapters.fallbacks,
            errors=counts["errors"],
            adapters=replace(cache.counts) if cache is not None else CacheCounts(),
        )

    def close(self, error: str | None = None) -> None:
        """Finish every request as cancelled, or as failed with `error`, and give the model its own bank back."""
        with self.changed:
            self._closed = True
            left = list(self._open)
        self._counts["errors"] += len(left) if error is not None else 0
        for handle in left:
            self._send(handle, Finished("cancelled") if error is None else Finished("error", error))
        self._inbox.clear()
        self._queue.remove(lambda _: True)
        self._batch.handles.clear()
        self._adapters.close()

    @torch.no_grad()
    def step(self) -> None:
        """Accept and cancel requests, decode one token for every row, then prefill new rows.

        Raises:
            StoreError: an adapter is damaged, if `strict`; any other error that ends a request is then raised too.
            Exception: an error that belongs to no request; the engine cannot go on.
        """
        while self._tasks:
            self._tasks.popleft()()
        self._accept()
        self._drop_cancelled()
        # Loads overlap with decoding, so that a load shorter than a decoding step delays no request.
        self._adapters.prefetch(self._queue.items())
        if len(self._batch):
            self._deliver(self._batch.decode(), 0)
        if self._strict:
            self.settle()
        self._adapters.collect(self._queue.items())
        self._prefill()
        self._counts["steps"] += 1

    def _before_step(self, task: Callable[[], None]) -> None:
        with self.changed:
            self._tasks.append(task)
            self.changed.notify_all()

    def _forget_user(self, tenant: str, user: str) -> None:
        self._adapters.forget(tenant, user)
        self._prefixes.forget(tenant, user)

    def _forget_deleted(self) -> None:
        for owner in self._adapters.owners() | self._prefixes.owners():
            try:
                gone = self._adapters.is_gone(*owner)
            except Exception:  # a store that cannot be read: it must not end the engine; the next request reports it
                gone = True
            if gone:
                self._forget_user(*owner)

    def _accept(self) -> None:
        while self._inbox:
            handle = self._inbox.popleft()
            try:
                self._adapters.accept(handle)
            except Exception as error:  # a store that cannot be read, for example
                self._fail(handle, error)
                continue
            self._queue.add(handle)

    def _drop_cancelled(self) -> None:
        for handle in self._queue.remove(lambda handle: handle.cancelled):
            self._send(handle, Finished("cancelled"))
        for row in reversed(range(len(self._batch))):
            if self._batch.handles[row].cancelled:
                self._end(row, Finished("cancelled"))

    def _prefill(self) -> None:
        """Start the requests that get a row now, and compute their prompts and first tokens."""
        free = self.limits.rows - len(self._batch)
        started = self._queue.take(free, self.limits.prefill, self._adapters.ready, self._batch.handles)
        if not started:
            return
        for handle in started:
            self._adapters.pin(handle)
            handle.status = "running"
            adapter, task = handle.slot >= 0, handle.request.task
            handle.prefix_key = self._prefixes.key_of(handle.owner, handle.head, adapter=adapter, task=task)
            version = None if handle.head is None else handle.head.version
            self._send(handle, Started(self._adapters.tier(handle), version, handle.fallback))
        self._counts["prompt"] += sum(handle.size for handle in started)
        tokens, failed = self._batch.prefill(started)
        for handle, error in failed:
            self._adapters.release(handle)
            self._fail(handle, error)
        self._deliver(tokens, len(self._batch) - len(tokens))
        if not tokens:
            self._batch.require_backbone()

    def _deliver(self, tokens: list[NextToken], first: int) -> None:
        """Append new tokens to the rows from `first` on; rows that have ended or failed leave the batch."""
        handles = self._batch.handles[first : first + len(tokens)]
        for row in reversed(range(len(handles))):
            handle, token = handles[row], tokens[row]
            if isinstance(token, Exception):
                self._end_failed(first + row, token)
                continue
            if token.id in self.model.encoder.ends:
                self._end(first + row, Finished("stop"))
                continue
            handle.tokens.append(token.id)
            self._tokens[self._adapters.tier(handle)] += 1
            self._send(handle, token)
            if len(handle.tokens) == handle.request.sampling.max_new_tokens:
                self._end(first + row, Finished("length"))
        if tokens and all(isinstance(token, Exception) for token in tokens):
            self._batch.require_backbone()

    def _end(self, row: int, event: Finished) -> None:
        handle = self._batch.handles[row]
        key = handle.prefix_key
        try:  # the row of a user who was updated or deleted meanwhile is not cached
            head = self._adapters.head(handle) if key is not None else None
            if key is not None and key == self._prefixes.key_of(handle.owner, head, adapter=key.adapter, task=key.task):
                self._batch.keep(row)
        except Exception:  # without the cached prefix the next prompt is slower, but no answer is lost
            self._counts["unkept"] += 1
        self._batch.leave(row)
        self._adapters.release(handle)
        self._send(handle, event)

    def _end_failed(self, row: int, error: Exception) -> None:
        """End a row whose computation failed; its user's adapter and prefixes may be corrupt, so they are dropped."""
        handle = self._batch.handles[row]
        self._batch.leave(row)
        self._adapters.release(handle)
        if handle.owner is not None:
            self._forget_user(*handle.owner)
        self._fail(handle, error)

    def _fail(self, handle: RequestHandle, error: Exception) -> None:
        """End one request as failed; if `strict`, raise the error."""
        self._counts["errors"] += 1
        self._send(handle, Finished("error", f"{type(error).__name__}: {error}"))
        if self._strict:
            raise error

    def _send(self, handle: RequestHandle, event: Event) -> None:
        if isinstance(event, Finished):
            handle.status = "finished"
            with self.changed:
                del self._open[handle]
        try:
            handle.sink(event)
        except Exception:
            # The receiver is gone: count it and cancel the request, so that the next step frees its row.
            self._counts["unsent"] += 1
            handle.cancelled = True
