"""What `/metrics` shows, in Prometheus's text format.

The number of label values is bounded: paths are those of the API, adapters are names that an answer bore, and the first
`MAX_ADAPTERS` of them; everything else is "other". What the engine counts is read when the page is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .observe import RequestLog

if TYPE_CHECKING:
    from .engine import Stats

MAX_ADAPTERS = 100
OTHER, MIX = "other", "mix"
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS"})
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# name, whether it only grows, the field of `Stats`, help
_OF_ENGINE = (
    ("lorakit_requests_running", False, "running", "requests in slots"),
    ("lorakit_requests_waiting", False, "waiting", "requests that wait for a slot"),
    ("lorakit_prompt_tokens", True, "prompt_tokens", "tokens of prompts"),
    ("lorakit_cached_prompt_tokens", True, "cached_tokens", "tokens of prompts that were not computed again"),
    ("lorakit_answer_tokens", True, "answer_tokens", "tokens of answers"),
    ("lorakit_adapters_on_device", False, "on_device", "adapters attached to the model"),
    ("lorakit_adapters_in_memory", False, "in_memory", "adapters kept in memory"),
    ("lorakit_adapter_memory_bytes", False, "memory_bytes", "bytes of the adapters kept in memory"),
    ("lorakit_adapter_loads", True, "loads", "adapters brought to the device"),
    ("lorakit_adapter_evictions", True, "evictions", "adapters taken off the device for others"),
    ("lorakit_engine_up", False, "alive", "1 while the engine computes"),
)


class Metrics:
    """Counters of requests, and the page. A registry of its own: prometheus_client's global one is everybody's."""

    def __init__(self, stats: Callable[[], Stats], paths: Iterable[str] = ()):
        """stats: the engine's. paths: the API's; others are counted together. `add_metrics` sets them."""
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.paths = frozenset(paths)
        self._adapters: set[str] = set()
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "lorakit_http_requests", "requests answered", ["method", "path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "lorakit_http_request_seconds", "to the answer's end", ["path"], buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "lorakit_http_first_byte_seconds",
            "to the answer's first part",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._by_adapter = Counter(
            "lorakit_adapter_requests", "requests answered, by adapter", ["adapter"], registry=registry
        )
        self._registry.register(_EngineCollector(stats))

    def observe(self, seen: RequestLog) -> None:
        """Count a request that has ended."""
        path = seen.path if seen.path in self.paths else OTHER
        method = seen.method if seen.method in METHODS else OTHER
        self._requests.labels(method, path, str(seen.status)).inc()
        self._seconds.labels(path).observe(seen.seconds)
        if seen.first is not None:
            self._first.labels(path).observe(seen.first)
        if seen.adapter is not None:
            self._by_adapter.labels(self._label(seen.adapter)).inc()

    def page(self) -> tuple[bytes, str]:
        """Return the page and its content type."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _label(self, adapter: str) -> str:
        """Return the label of an adapter as an answer names it: without the hash; all mixes have one label."""
        name = MIX if "+" in adapter else adapter.rpartition("@")[0] or adapter  # no name has a "+"
        if name not in self._adapters and len(self._adapters) >= MAX_ADAPTERS:
            return OTHER
        self._adapters.add(name)
        return name


class _EngineCollector:
    """Reads the engine's counts when the page is made, so that the engine need not know of it."""

    def __init__(self, stats: Callable[[], Stats]):
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._stats()
        for name, grows, field, help in _OF_ENGINE:
            family = CounterMetricFamily if grows else GaugeMetricFamily
            yield family(name, help, value=float(getattr(stats, field)))
        if stats.last_step is not None:
            since = time.monotonic() - stats.last_step
            yield GaugeMetricFamily("lorakit_seconds_since_last_step", "of the engine", value=since)


def add_metrics(app: Any, metrics: Metrics) -> None:
    """Give a FastAPI application the page /metrics."""
    from fastapi.responses import Response

    async def page() -> Any:
        content, kind = metrics.page()
        return Response(content, headers={"content-type": kind})

    app.add_api_route(
        "/metrics",
        page,
        methods=["GET"],
        response_class=Response,
        response_model=None,
        summary="Counters in Prometheus's text format",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    metrics.paths = frozenset(app.openapi()["paths"])
