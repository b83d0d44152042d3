"""Ray Serve's replicas of the detector, as the service's door asks them."""

import asyncio
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from jobs.cluster import available_cpus
from jobs.serve_app import Unavailable
from jobs.serve_deployment import DetectorReplica, Settings
from pipeline.errors import UserError

if TYPE_CHECKING:
    from jobs.serve import ServeOptions

APPLICATION = "detector"
QUIET = {"log_level": "WARNING", "enable_access_log": False}
READY_FOR = 1.0  # seconds that Ray Serve's word on its replicas counts


class Replicas:
    """The replicas behind a handle of Ray Serve, which chooses one for each image."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.asked = -READY_FOR
        self.ready = True

    async def detect(self, data: bytes, threshold: float, most: int) -> dict[str, Any]:
        """As `jobs.serve_app.Detect` says."""
        response = self.handle.remote(data, threshold, most)
        try:
            found: dict[str, Any] = await response
            return found
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError:
            raise
        except (RayActorError, DeploymentUnavailableError, BackPressureError):
            raise Unavailable from None

    async def are_ready(self) -> bool:
        if time.monotonic() - self.asked > READY_FOR:
            self.ready = await asyncio.to_thread(_running)
            self.asked = time.monotonic()
        return self.ready


def _running() -> bool:
    application = serve.status().applications.get(APPLICATION)
    return application is not None and application.status == "RUNNING"


@contextmanager
def deployed(options: "ServeOptions", model: dict[str, Any], head: str) -> Iterator[Replicas]:
    """Deploys the replicas on the cluster of the node at `head`, waits until they have loaded the
    model, and lets go of the cluster in the end, which takes them down. Raises `UserError` where
    they fail."""
    on_gpu = model["device"] == "cuda"
    cpus = max(1, available_cpus() // options.replicas)
    settings = Settings(
        str(options.checkpoint.resolve()),
        options.device,
        options.precision,
        options.max_batch,
        options.max_wait_ms / 1000,
        model["limits"]["megapixels"],
        model["limits"]["longest_side"],
    )
    application = serve.deployment(
        DetectorReplica,
        num_replicas=options.replicas,
        # The queue is the door's; what it takes is decoded while a batch is looked at.
        max_ongoing_requests=options.max_queue,
        max_queued_requests=-1,
        ray_actor_options={"num_cpus": cpus, "num_gpus": 1 if on_gpu else 0},
        health_check_period_s=5,
        logging_config=QUIET,
        graceful_shutdown_timeout_s=2,
    ).bind(settings)
    at_term = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=head, namespace=APPLICATION, logging_level="ERROR")
        signal.signal(signal.SIGTERM, at_term)  # Ray sets its own
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        try:
            handle = serve.run(application, name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"the detector did not start: {last}") from None
        yield Replicas(handle)
    finally:
        ray.shutdown()
