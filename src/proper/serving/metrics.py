"""Prometheus metrics: engine and fit queue figures, read on each scrape, and request latencies, recorded as they occur.

No label carries a user or a key.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proper.inference.requests import Event, Finished, Sink, Started, Token
from proper.interactions.fit_queue import FitQueue
from proper.run_folder import Tier
from proper.serving.engines import AnsweringEngine
from proper.serving.fit_process import FitProcess

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: AnsweringEngine, fits: FitQueue | None = None, worker: FitProcess | None = None) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineFigures(engine))
        if fits is not None:
            self.registry.register(_FitFigures(fits, worker))
        self.replies = Counter("proper_http_replies", "Replies.", ["route", "status"], registry=self.registry)
        self._first = self._histogram("proper_first_token_seconds", "From a request's acceptance to its first token.")
        self._whole = self._histogram("proper_request_seconds", "From a request's acceptance to its end.")
        self._ends = Counter("proper_requests", "Ended requests.", ["tier", "reason"], registry=self.registry)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def timed(self, sink: Sink) -> Sink:
        """Return a sink that passes events on and records their latencies."""
        begun, first = time.monotonic(), True
        tier: str = Tier.NONE

        def measure(event: Event) -> None:
            nonlocal tier, first
            if isinstance(event, Started):
                tier = event.tier
            elif isinstance(event, Token) and first:
                first = False
                self._first.labels(tier).observe(time.monotonic() - begun)
            elif isinstance(event, Finished):
                self._whole.labels(tier).observe(time.monotonic() - begun)
                self._ends.labels(tier, event.reason).inc()
            sink(event)

        return measure

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, ["tier"], buckets=_SECONDS, registry=self.registry)


class _FitFigures(Collector):
    def __init__(self, fits: FitQueue, worker: FitProcess | None) -> None:
        self.fits, self.worker = fits, worker

    def collect(self) -> Iterator[Metric]:
        figures, worker = self.fits.figures(), self.worker
        yield GaugeMetricFamily("proper_fits_queued", "Users queued for a fit.", figures.queued)
        yield GaugeMetricFamily("proper_fits_running", "Users whose fit runs.", figures.fitting)
        yield CounterMetricFamily("proper_fits_done", "Completed fits.", figures.done)
        yield CounterMetricFamily("proper_fits_failed", "Failed fits.", figures.failed)
        alive = worker is not None and worker.alive
        yield GaugeMetricFamily("proper_fit_worker_up", "1 if the fit worker runs.", int(alive))
        restarts = 0 if worker is None else worker.restarts
        yield CounterMetricFamily("proper_fit_worker_restarts", "Restarts of the fit worker.", restarts)


class _EngineFigures(Collector):
    def __init__(self, engine: AnsweringEngine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        gauges = {
            "replicas": ("Engines that answer.", stats.replicas),
            "queue_requests": ("Queued requests.", stats.waiting),
            "batch_rows": ("Running requests (batch rows).", stats.running),
            "slots": ("Slots of the adapter bank.", stats.slots),
            "slots_resident": ("Slots with an adapter.", stats.resident),
            "slots_pinned": ("Slots pinned by running requests.", stats.pinned),
            "slots_loading": ("Adapters being loaded into a slot.", stats.loading),
            "prefix_bytes": ("Bytes of the prefix cache.", stats.prefix_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"proper_{name}", text, value)
        adapters = stats.adapters
        counters = {
            "steps": ("Engine steps.", stats.steps),
            "prompt_tokens": ("Prompt tokens.", stats.prompt_tokens),
            "prompt_tokens_reused": ("Prompt tokens served by the prefix cache.", stats.reused_tokens),
            "slot_hits": ("Slot cache hits.", adapters.hits),
            "adapter_loads": ("Adapter loads.", adapters.loads),
            "slot_evictions": ("Slot cache evictions.", adapters.evictions),
            "damaged_adapters": ("Adapter loads that failed an integrity check.", adapters.damaged),
            "fallbacks": ("Requests answered by a lower tier after a failed adapter load.", stats.fallbacks),
            "failed_requests": ("Requests ended by a failed step.", stats.errors),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"proper_{name}", text, value)
        tokens = CounterMetricFamily("proper_new_tokens", "Generated tokens.", labels=["tier"])
        for tier, count in stats.tokens.items():
            tokens.add_metric([tier], count)
        yield tokens
