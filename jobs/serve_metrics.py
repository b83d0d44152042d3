"""What the service counts, as Prometheus reads it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one service, in a registry of their own; `text` gives them all."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "detector_requests", "Requests by path and status", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "detector_request_seconds", "From the head of a POST /detect to its answer",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.images = Counter(
            "detector_images", "Images by outcome", ["outcome"], registry=self.registry
        )
        self.batches = Histogram(
            "detector_batch_images", "Images that the model took at once",
            buckets=SIZES, registry=self.registry,
        )  # fmt: skip
        self.queue = Gauge(
            "detector_queue_images", "Images received, waiting or looked at",
            registry=self.registry,
        )  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self.registry)
