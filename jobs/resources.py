"""Whether the cluster has room for a job's workers, and what to say while it has not."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipeline.config import RunConfig
from pipeline.errors import UserError

PATIENCE = 10.0  # seconds until a job that waits says so


def wants_gpu(config: RunConfig, workers: int, gpus: int) -> bool:
    """Whether workers take a GPU each, given how many the cluster has.

    With fewer GPUs than workers the job waits for more, rather than training on CPUs for as long
    as a node is away.
    """
    if config.engine.device == "cuda" and gpus == 0:
        raise UserError(
            f"engine.device cuda: got a cluster without GPUs, expected {workers}, one for each "
            f"worker; add GPU nodes, or use --engine.device cpu"
        )
    return config.engine.device != "cpu" and gpus > 0


def room(need: Mapping[str, float], nodes: Iterable[Mapping[str, Any]]) -> int:
    """Workers of these resources that the nodes (as `ray.nodes()` lists them) could hold."""
    return sum(
        min(int(node["Resources"].get(name, 0) // amount) for name, amount in need.items())
        for node in nodes
        if node["Alive"]
    )


def recount() -> None:
    """Has Ray look at the cluster's nodes now. An elastic group is sized by what Ray saw last, up
    to 20 s ago, and then waits in vain for a node that is gone."""
    # Heavy: it brings all of ray.data.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator = get_or_create_autoscaling_coordinator()
    ray.get(coordinator.get_reserved_resources.remote("nobody", recompute=True))


def placement_groups(*states: str) -> list[str]:
    """Ids of this job's placement groups in these states."""
    job = ray.get_runtime_context().get_job_id()  # the end of its groups' ids
    table = ray.util.placement_group_table()
    return [g for g, about in table.items() if g.endswith(job) and about["state"] in states]


def release() -> None:
    """Gives back what an earlier worker group of this job still has. Where its controller was
    killed, Ray Train's own cleaner (2.60) does not, and the next group waits for it in vain."""
    for group in placement_groups("CREATED", "PENDING", "RESCHEDULING"):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


class Waiting:
    """Says once that a job waits for resources, and for which, and once that they came."""

    def __init__(self, need: Mapping[str, float], workers: int) -> None:
        self.need, self.workers = need, workers
        self.since, self.said = time.monotonic(), False

    def look(self, has_resources: bool) -> None:
        seconds = time.monotonic() - self.since
        if has_resources and self.said:
            print(f"the workers have their resources, after {seconds:.0f} s", flush=True)
            self.said = False
        if has_resources:
            self.since = time.monotonic()
        elif not self.said and seconds > PATIENCE and (message := self.message()):
            print(message, flush=True)
            self.said = True

    def message(self) -> str:
        """What is missing. Empty where nothing is: then Ray Train is starting."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        total = room(self.need, nodes)
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.need.items())
        wants = f"waiting for resources: {self.workers} workers of {each} each"
        if total < self.workers:
            return (
                f"{wants}; the cluster has room for {total} (nodes: {len(nodes)}). Training starts "
                f"when nodes are added; or stop the job and lower --workers"
            )
        free = ray.available_resources()
        if all(free.get(name, 0) >= amount * self.workers for name, amount in self.need.items()):
            return ""
        now = ", ".join(f"{free.get(name, 0):g} {name}" for name in self.need)
        return f"{wants}; the cluster has room for {total}, but only {now} free of other jobs"
