"""Simulate when the jobs of a plan run on its machines, and find the longest chain of them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from arena_distill.config.plan import Plan
from arena_distill.planning.costs import Cost
from arena_distill.runs.graph import Planned

HOUR = 3600.0


def _following(jobs: Sequence[Planned]) -> list[list[int]]:
    """For each job, the jobs that read its outputs."""
    following: list[list[int]] = [[] for _ in jobs]
    for i, job in enumerate(jobs):
        for before in job.after:
            following[before].append(i)
    return following


def _seconds_to_end(jobs: Sequence[Planned], costs: Sequence[Cost]) -> list[float]:
    """Seconds from each job's start to the end of the longest chain from it."""
    longest = [0.0] * len(jobs)
    waiting = list(map(len, _following(jobs)))  # readers not yet visited
    ready = [i for i, count in enumerate(waiting) if not count]
    while ready:
        i = ready.pop()
        longest[i] += costs[i].seconds
        for before in jobs[i].after:
            longest[before] = max(longest[before], longest[i])
            waiting[before] -= 1
            if not waiting[before]:
                ready.append(before)
    return longest


def critical_path(jobs: Sequence[Planned], costs: Sequence[Cost]) -> list[int]:
    """The jobs of the longest chain, in order; more machines cannot make it shorter."""
    longest, following = _seconds_to_end(jobs, costs), _following(jobs)
    chain: list[int] = []
    candidates = [i for i, job in enumerate(jobs) if not job.after]
    while candidates:
        chain.append(max(candidates, key=lambda i: longest[i]))
        candidates = following[chain[-1]]
    return chain


def simulate(jobs: Sequence[Planned], costs: Sequence[Cost], plan: Plan) -> list[float]:
    """Return the start of each job in seconds: list scheduling, longest path to the end first.

    A job holds its cores, and an equal part of its GPUs, on each of its nodes. (R. L. Graham 1969, Bounds
    on multiprocessing timing anomalies, SIAM J. Appl. Math. 17(2).)
    """
    longest, following = _seconds_to_end(jobs, costs), _following(jobs)
    gpus, cores = [plan.gpus_per_node] * plan.nodes, [plan.cores_per_node] * plan.nodes
    start = [0.0] * len(jobs)
    left = [len(job.after) for job in jobs]
    ready = [(-longest[i], i) for i, count in enumerate(left) if not count]
    running: list[tuple[float, int, list[int]]] = []

    def part(i: int) -> tuple[int, int]:
        """GPUs and cores on each of its nodes."""
        return costs[i].gpus // costs[i].nodes, min(costs[i].cores, plan.cores_per_node)

    now = 0.0
    while ready or running:
        still = []
        for rank, i in sorted(ready):
            asked = part(i)
            fitting = [n for n in range(plan.nodes) if gpus[n] >= asked[0] and cores[n] >= asked[1]]
            if len(fitting) < costs[i].nodes:
                still.append((rank, i))
                continue
            # The fullest nodes with room, so that whole nodes stay free for jobs that need one.
            fitting.sort(key=lambda n: (gpus[n], cores[n]))
            taken = fitting[: costs[i].nodes]
            for node in taken:
                gpus[node] -= asked[0]
                cores[node] -= asked[1]
            start[i] = now
            heapq.heappush(running, (now + costs[i].seconds, i, taken))
        ready = still
        now, i, taken = heapq.heappop(running)
        for node in taken:
            gpus[node] += part(i)[0]
            cores[node] += part(i)[1]
        for after in following[i]:
            left[after] -= 1
            if not left[after]:
                ready.append((-longest[after], after))
    return start
