"""Load a server on this machine: many clients beside one, with their latencies and the server's memory.

    python benchmarks/serve.py results/default/merged/gemma2-student

Starts `arena-distill serve`, asks it one battle per request, first one by one, then with many clients at a
time. Each part ends after so many requests or seconds, whichever is first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass

import httpx2
import numpy as np
import psutil

WORDS = ("the", "sea", "is", "deep", "and", "waves", "are", "high", "why", "does", "an", "answer")


def battle(number: int, words: int) -> dict[str, str]:
    """One of its own: answers of up to `words` words."""
    rng = random.Random(number)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    return {
        "prompt": f"{number} {text(words // 4)}",
        "response_a": text(words),
        "response_b": text(words),
    }


@dataclass
class Part:
    """What some clients met: seconds of each answer, seconds of all, answers by status."""

    latencies: list[float]
    seconds: float
    statuses: dict[int, int]

    def __str__(self) -> str:
        p50, p95 = np.quantile(self.latencies, [0.5, 0.95]) * 1000
        return (
            f"{len(self.latencies) / self.seconds:7.1f} battles/s   p50 {p50:7.1f} ms   "
            f"p95 {p95:7.1f} ms   {len(self.latencies)} answers, by status {self.statuses}"
        )


async def load(
    address: str, clients: int, first: int, requests: int, seconds: float, words: int
) -> Part:
    """Requests from so many clients at a time."""
    numbers = iter(range(first, first + requests))
    latencies: list[float] = []
    statuses: dict[int, int] = {}
    began = time.perf_counter()

    async def client() -> None:
        for number in numbers:
            if time.perf_counter() - began > seconds:
                return
            start = time.perf_counter()
            said = await http.post("/v1/judge", json={"battles": [battle(number, words)]})
            latencies.append(time.perf_counter() - start)
            statuses[said.status_code] = statuses.get(said.status_code, 0) + 1

    async with httpx2.AsyncClient(
        base_url=address, timeout=300, trust_env=False, limits=httpx2.Limits(max_connections=None)
    ) as http:
        await asyncio.gather(*(client() for _ in range(clients)))
    return Part(latencies, time.perf_counter() - began, statuses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("judge")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--words", type=int, default=40, help="the most words of an answer")
    how = parser.parse_args()
    words = [sys.executable, "-m", "arena_distill", "serve", how.judge, "--port", "0"]
    server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        memory = psutil.Process(server.pid).memory_info
        print(f"{how.judge}: {os.cpu_count()} CPU cores, answers of up to {how.words} words")
        asyncio.run(load(address, 4, -8, 8, 60, how.words))  # warms up
        begun = memory().rss
        many = (how.clients, how.requests)
        for clients, requests in ((1, how.requests // 4), many, many):  # twice: is memory flat?
            part = asyncio.run(load(address, clients, 0, requests, how.seconds, how.words))
            print(f"{clients:3} clients {part}   memory {memory().rss / 2**20:.0f} MiB")
        print(f"memory at the start {begun / 2**20:.0f} MiB")
        figures = httpx2.get(f"{address}metrics", trust_env=False).text.splitlines()
        shown = ("arena_batch_sequences_sum", "arena_batch_sequences_count", "arena_tokens_total")
        print(json.dumps(dict(line.split() for line in figures if line.startswith(shown))))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
