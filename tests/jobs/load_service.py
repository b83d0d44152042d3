"""Load on running services: throughput and latency of POST /detect, and what overload does.

    python tests/jobs/load_service.py --image street.jpg --seconds 10 --clients 1 4 16 64 \
        --service batched=http://127.0.0.1:8123@PID --service single=http://127.0.0.1:8124@PID

Each client asks again as soon as it is answered. Services are measured in turn, in several rounds;
medians over the rounds are printed, and the memory after each round. PID: of the service, for its
memory with all below it.
"""

import argparse
import asyncio
import statistics
import time
from pathlib import Path

import aiohttp
import psutil


async def client(session, url, image, until, answered, refused):
    while time.monotonic() < until:
        began = time.monotonic()
        headers = {"Content-Type": "image/jpeg"}
        async with session.post(f"{url}/detect", data=image, headers=headers) as response:
            await response.read()
        if response.status == 200:
            answered.append(time.monotonic() - began)
        elif response.status == 503:
            assert response.headers["Retry-After"] == "1"
            refused.append(time.monotonic() - began)
            await asyncio.sleep(0.1)  # a tenth of what it was asked to wait
        else:
            raise RuntimeError(f"status {response.status}")


async def load(url, image, clients, seconds):
    """(seconds of each request that was answered, of each that was refused, seconds in all)"""
    answered: list[float] = []
    refused: list[float] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        began = time.monotonic()
        until = began + seconds
        await asyncio.gather(
            *(client(session, url, image, until, answered, refused) for _ in range(clients))
        )
    return answered, refused, time.monotonic() - began


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def memory(pid):
    """Megabytes of a process and all below it, each page counted once."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_full_info().pss for one in family) / 1e6


def measure(services, image, clients, seconds, rounds):
    rows: dict[tuple[str, int], list] = {}
    for _ in range(rounds):
        for count in clients:
            for name, (url, pid) in services.items():
                answered, refused, took = asyncio.run(load(url, image, count, seconds))
                rows.setdefault((name, count), []).append(
                    (
                        len(answered) / took,
                        *(1000 * percentile(answered, share) for share in (0.5, 0.9, 0.99)),
                        len(refused),
                        memory(pid),
                    )
                )
    print("| service | clients | images/s | spread | p50 ms | p90 ms | p99 ms | 503 | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (name, count), found in rows.items():
        rate, p50, p90, p99, refused, _ = map(statistics.median, zip(*found, strict=True))
        memories = ", ".join(f"{one[-1]:.0f}" for one in found)
        rates = [one[0] for one in found]
        print(
            f"| {name} | {count} | {rate:.1f} | {min(rates):.1f}–{max(rates):.1f} | {p50:.0f} | "
            f"{p90:.0f} | {p99:.0f} | {refused:.0f} | {memories} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--service", action="append", required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    services = {}
    for text in options.service:
        name, rest = text.split("=", 1)
        url, pid = rest.rsplit("@", 1)
        services[name] = (url, int(pid))
    measure(services, options.image.read_bytes(), options.clients, options.seconds, options.rounds)
