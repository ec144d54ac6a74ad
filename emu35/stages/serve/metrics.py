"""What ``/metrics`` shows: counters and histograms of calls, and the engine's own numbers.

Each server has a registry of its own. Times are seconds, sizes tokens.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emu35.inference.engine import EngineStats

_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"emu35_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"emu35_{name}", text, buckets=buckets, registry=registry)

        self.calls = counter("http_requests", "HTTP requests answered", "endpoint", "status")
        self.tokens = counter("tokens", "tokens read (prompt) and generated, by kind", "kind")
        self.images = counter("images", "whole images generated")
        self.ended = counter("requests_ended", "requests that ended, by reason", "reason")
        self.failures = counter("engine_failures", "steps of the engine that failed")
        self.queue_time = histogram("queue_seconds", "from acceptance to the engine", _WAITS)
        self.first_token_time = histogram(
            "time_to_first_token_seconds", "from acceptance to the first token", _WAITS
        )
        self.token_time = histogram(
            "time_per_token_seconds", "mean time of a request's later tokens", _TOKEN_TIMES
        )

    def watch(self, stats: Callable[[], EngineStats | None]) -> None:
        """Also show what ``stats`` says at the time of asking (None: no engine yet)."""
        self._registry.register(_EngineCollector(stats))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        if stats is None:
            return
        for name, text, value in (
            ("requests_waiting", "requests that wait for room in the engine", stats.waiting),
            ("requests_active", "requests being generated", stats.active),
            ("cache_used_tokens", "cache slots in use", stats.cache_used),
            ("cache_tokens", "cache slots there are", stats.cache_tokens),
        ):
            yield GaugeMetricFamily(f"emu35_{name}", text, value=value)
        for name, text, value in (
            ("forwards", "forward passes of the model", stats.forwards),
            ("preemptions", "requests put back because the cache was full", stats.preemptions),
            ("denoise_steps", "steps of pictures decoded in parallel", stats.denoise_steps),
            ("images_denoised", "pictures decoded in parallel", stats.images_denoised),
        ):
            yield CounterMetricFamily(f"emu35_{name}", text, value=value)
