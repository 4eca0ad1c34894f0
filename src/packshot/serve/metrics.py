"""Prometheus metrics of one app, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")


class Metrics:
    """The values that ``GET /metrics`` shows."""

    def __init__(self, endpoints: Collection[str], queue_length: Callable[[], int], loaded: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self._endpoints = {*endpoints, "/jobs/{id}"}
        labels = ("method", "endpoint", "status_code")
        self._requests = Counter("http_requests", "Requests answered.", labels, registry=self.registry)
        self._duration = Histogram(
            "http_request_duration_seconds", "Arrival to last byte.", labels[:2], registry=self.registry
        )
        self.active = Gauge("http_requests_active", "Requests in work.", registry=self.registry)
        self.inference = Histogram(
            "packshot_inference_duration_seconds",
            "One request's turn on the model.",
            buckets=(0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600),
            registry=self.registry,
        )
        is_loaded = Gauge("packshot_model_loaded", "1 once the model answers.", registry=self.registry)
        is_loaded.set_function(loaded)
        length = Gauge("packshot_queue_length", "Requests waiting for the model.", registry=self.registry)
        length.set_function(queue_length)

    def count(self, method: str, path: str, status: int, seconds: float) -> None:
        """Record an answered request. Clients choose method and path, so unknown ones share one label."""
        method = method if method in METHODS else "other"
        endpoint = "/jobs/{id}" if path.startswith("/jobs/") else path
        endpoint = endpoint if endpoint in self._endpoints else "other"
        self._requests.labels(method, endpoint, str(status)).inc()
        self._duration.labels(method, endpoint).observe(seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
