"""Count requests and batches for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from arena_distill.judging.server.batching import Ran

_SIZES = (1, 4, 16, 64, 256, 1024)


class Metrics:
    """Figures of one server, in a registry of their own; names begin with `arena_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "arena_requests", "Requests answered.", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "arena_request_seconds", "From the first byte to the answer.", ["path"],
            registry=self.registry,
        )  # fmt: skip
        self._batches = Histogram(
            "arena_batch_sequences", "Sequences of a batch.", buckets=_SIZES, registry=self.registry
        )
        self._tokens = Counter("arena_tokens", "Tokens of all batches.", registry=self.registry)
        self._spared = Counter(
            "arena_repeated_sequences", "Sequences equal to another of their batch, run once.",
            registry=self.registry,
        )  # fmt: skip
        self._busy = Counter(
            "arena_model_seconds", "Seconds in which the model ran.", registry=self.registry
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def ran(self, batch: Ran) -> None:
        self._batches.observe(batch.sequences)
        self._tokens.inc(batch.tokens)
        self._spared.inc(batch.sequences - batch.distinct)
        self._busy.inc(batch.seconds)

    def watch(self, waiting: Callable[[], int]) -> None:
        """Report the tokens of a queue."""
        gauge = Gauge("arena_queue_tokens", "Tokens that wait.", registry=self.registry)
        gauge.set_function(waiting)
