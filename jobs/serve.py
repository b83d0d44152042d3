"""`python -m jobs serve`: a checkpoint as an HTTP service, by Ray Serve on this machine.

The door, which is this process, speaks HTTP and holds what a client may do to limits; replicas of
the detector, Ray Serve's, look at images. Serve's own HTTP proxy is left out: it takes bodies of
any size into memory, and clients can switch its timeout off.
"""

import hashlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from jobs.cluster import available_cpus, local_cluster
from pipeline.cli import REQUIRED, parse
from pipeline.config import AugmentConfig
from pipeline.errors import UserError

if TYPE_CHECKING:
    from jobs.serve_replicas import Replicas
    from jobs.serve_requests import Limits

RAY = {
    # A service is not to yield to whatever else the machine does, as training jobs are.
    "RAY_worker_niceness": "0",
    # Ray would end replicas once the machine's memory is nearly full, whoever fills it.
    "RAY_memory_monitor_refresh_ms": "0",
    # Seconds for a replica to say how much it has to do; 0.1 is short for a machine at its limit.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1.0",
    # As for the cluster: else Ray looks for 127.0.0.1 under the machine's own address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@dataclass(frozen=True)
class ServeOptions:
    checkpoint: Positional[Path] = REQUIRED
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    host: str = "127.0.0.1"
    """Address to listen at. Others than 127.0.0.1 are open to the network: see docs/serve.md."""
    port: int = 8000
    """0: any that is free."""
    names: tuple[str, ...] = ()
    """Host names under which clients ask for the service; addresses and localhost always do."""
    replicas: int = 1
    """Copies of the model. Each takes a GPU, or a share of the CPUs."""
    device: str = "auto"
    precision: str = ""
    """fp32, bf16 or fp16. Empty: as the run was trained."""
    max_batch: int = 8
    """Images that the model takes at once. 1: no batching."""
    max_wait_ms: float = 10.0
    """How long an image waits for others to share its batch."""
    max_megabytes: float = 20.0
    """Of a request's body."""
    max_megapixels: float = 50.0
    """Of an image."""
    max_images: int = 16
    """Of a request."""
    max_queue: int = 64
    """Images received, waiting or looked at, of all clients; beyond, the answer is 503."""
    timeout: float = 60.0
    """Seconds for a request, from its head to its answer."""
    threshold: float = 0.3
    """Smallest score of a detection, where a request does not say."""


def run_serve(args: list[str]) -> None:
    options = parse(
        ServeOptions,
        args,
        "python -m jobs serve",
        "Answers HTTP requests with detections, and shows a page to try it on.\n\n"
        "Example: python -m jobs serve runs/r50\n"
        "         curl -H 'Content-Type: image/jpeg' --data-binary @street.jpg "
        "http://127.0.0.1:8000/detect",
    )
    check(options)
    with listening(options.host, options.port) as door:
        model = describe(options)
        print("starting Ray Serve", flush=True)
        for name, value in RAY.items():
            os.environ.setdefault(name, value)
        with local_cluster() as cluster:
            # Ray reads the above, and the cluster's token, as it is imported.
            from jobs.serve_replicas import deployed

            with deployed(options, model, cluster.head) as replicas:
                answer(options, door, model, replicas)
                print("stopping", flush=True)


def check(options: ServeOptions) -> None:
    """Raises `UserError` for what can be seen to be wrong at once."""
    if not options.checkpoint.exists():
        raise UserError(
            f"checkpoint {str(options.checkpoint)!r} does not exist: expected a run folder, a "
            f"checkpoint in it, or a model.pt"
        )
    least = {
        "port": 0, "replicas": 1, "max_batch": 1, "max_wait_ms": 0, "max_images": 1, "max_queue": 1,
    }  # fmt: skip
    for name, smallest in least.items():
        value = getattr(options, name)
        if value < smallest or (name == "port" and value > 65535):
            most = " to 65535" if name == "port" else " or more"
            option = name.replace("_", "-")
            raise UserError(f"--{option}: got {value:g}, expected {smallest}{most}")
    for name in ("max_megabytes", "max_megapixels", "timeout"):
        value = getattr(options, name)
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')}: got {value:g}, expected more than 0")
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold: got {options.threshold:g}, expected 0 to 1")
    if options.max_images > options.max_queue:
        raise UserError(
            f"--max-images: got {options.max_images}, expected no more than --max-queue "
            f"{options.max_queue}, or such a request could never be taken"
        )


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """The socket of the service, bound, so that the port is its own; not open yet.

    Raises `UserError` for a port that is taken and an address that is not this machine's."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host: got {host!r}, expected an address of this machine") from None
    with socket.socket(family, kind) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(address)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"cannot listen at {host} port {port}: {reason}; give another --port, or 0 for "
                f"any that is free"
            ) from None
        if not ipaddress.ip_address(door.getsockname()[0]).is_loopback:
            print(
                f"warning: at {host} anybody on the network can use this service; it asks for no "
                f"password and does not encrypt (docs/serve.md, Security)",
                file=sys.stderr,
            )
        yield door


def describe(options: ServeOptions) -> dict[str, Any]:
    """What GET /model tells. Loads the model once, so that a checkpoint or device that will not do
    is told of before Ray starts."""
    import torch

    from pipeline.checkpoint_store import load_model
    from pipeline.predict import Detector

    if options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise UserError("--device: got cuda, but torch sees no GPU; use --device cpu")
        if options.replicas > torch.cuda.device_count():
            raise UserError(
                f"--replicas: got {options.replicas}, expected at most the "
                f"{torch.cuda.device_count()} GPUs of this machine: each replica takes one"
            )
    elif options.replicas > available_cpus():
        raise UserError(
            f"--replicas: got {options.replicas}, expected at most the {available_cpus()} CPUs "
            f"that this process may use"
        )
    detector = Detector.load(options.checkpoint, options.device, options.precision)
    progress = load_model(options.checkpoint).get("progress", {})
    config = detector.config
    return {
        "recipe": config.recipe,
        "classes": [
            {"category_id": category, "name": name}
            for category, name in zip(
                detector.labels.category_of, detector.labels.names, strict=True
            )
            if category >= 0
        ],
        "image_size": {
            "short_side": config.augment.val_short_side or None,
            "longest_side": config.augment.max_side if config.augment.val_short_side else None,
        },
        "parameters": sum(p.numel() for p in detector.model.parameters()),
        "weights_sha256": weights_digest(detector.model.state_dict()),
        "trained": {"steps": progress.get("step"), "epochs": progress.get("epoch")},
        "device": detector.device.type,
        "precision": config.engine.precision,
        "limits": asdict(limits(options, config.augment)),
    }


def weights_digest(weights: dict[str, Any]) -> str:
    """SHA-256 of the names and values of all weights: equal for the same model in any file."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def limits(options: ServeOptions, augment: AugmentConfig) -> "Limits":
    """A model that takes images in their own size is given none that are larger than what other
    models resize them to: its memory grows with their pixels, and a long one pads a batch."""
    from jobs.serve_requests import Limits

    return Limits(
        megabytes=options.max_megabytes,
        megapixels=options.max_megapixels,
        longest_side=0 if augment.val_short_side else augment.max_side,
        images=options.max_images,
        queue=options.max_queue,
        seconds=options.timeout,
        threshold=options.threshold,
    )


def answer(
    options: ServeOptions, door: socket.socket, model: dict[str, Any], replicas: "Replicas"
) -> None:
    """Answers requests until SIGINT or SIGTERM; then those that have come, and returns."""
    from jobs.serve_app import Service
    from jobs.serve_door import Door
    from jobs.serve_requests import Limits

    own = {socket.gethostname().lower(), socket.getfqdn().lower(), options.host.lower()}
    service = Service(
        replicas.detect,
        replicas.are_ready,
        model,
        Limits(**model["limits"]),
        own | {name.lower() for name in options.names},
    )
    address, port = door.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    Door(service.application()).run(
        door, lambda: print(f"ready: http://{shown}:{port}/", flush=True)
    )
