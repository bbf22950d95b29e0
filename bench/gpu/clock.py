# SPDX-License-Identifier: Apache-2.0
"""Times of calls that run in alternation: from events on a GPU, from the wall clock on a CPU."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Several times the largest second-level cache of a current GPU.
FLUSH_BYTES = 256 << 20
# Cycles per second of a GPU that spins; only the lead of the host depends on it.
CYCLES = 2.0e9
LONGEST_PAUSE = 5e-3
REPLAYS = 20

Call = Callable[[], Any]
Around = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contestant:
    """A call and its context: a forced backend, or a mode of torch's products."""

    call: Call
    around: Around = contextlib.nullcontext


@dataclass
class Times:
    """Milliseconds of each round, or the reason why there are none."""

    ms: list[float]
    reason: str | None = None

    def quantile(self, share: float) -> float | None:
        ordered = sorted(self.ms)
        return ordered[round(share * (len(ordered) - 1))] if ordered else None


class Clock:
    """Times one call at a time on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.trash = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def host(self, call: Call) -> float:
        """Wall seconds of a call until the device has finished it."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def lead(self, call: Call) -> int:
        """Cycles for which the device must spin, so that the host has queued a whole call before
        the device starts it: otherwise the time of a short call is the time of its launches.
        """
        if not self.cuda:
            return 0
        self.wait()
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        self.wait()
        return int(CYCLES * min(LONGEST_PAUSE, 2e-5 + 1.5 * queued))

    def device(self, call: Call, lead: int = 0, repeats: int = 1) -> float:
        """Milliseconds of a call on the device, with its data out of the second-level cache."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        self.trash.zero_()
        if lead:
            torch.cuda._sleep(lead)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / repeats


def tf32() -> contextlib.AbstractContextManager[None]:
    """torch computes float32 products in tf32, as torch's precision "high" does."""
    return products("high")


@contextlib.contextmanager
def products(mode: str) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def graph_replay(call: Call) -> Call:
    """The replay of a CUDA graph of a call; capture needs a warm-up on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def race(
    clock: Clock, contestants: dict[str, Contestant], rounds: int, seconds: float, kind: str
) -> dict[str, Times]:
    """Time all in alternation, in an order that turns from round to round.

    `kind` is "device" (a cold cache, events), "host" (wall time until the device is done) or
    "graph" (replays back to back). A contestant that raises is out, with its reason; the rounds end
    early, but not before five, when the seconds are spent.
    """
    ends = time.monotonic() + seconds
    times = {name: Times([]) for name in contestants}
    calls: dict[str, tuple[Contestant, int]] = {}
    for name, contestant in contestants.items():
        try:
            calls[name] = _prepare(clock, contestant, kind)
        except Exception as error:  # the table shows the error of a rival
            times[name].reason = f"{type(error).__name__}: {error}"[:300]
        free_memory(clock)
    names = list(calls)
    for turn in range(rounds):
        if turn >= 5 and time.monotonic() > ends:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            contestant, lead = calls[name]
            with contestant.around():
                times[name].ms.append(_once(clock, contestant.call, lead, kind))
    return times


def _prepare(clock: Clock, contestant: Contestant, kind: str) -> tuple[Contestant, int]:
    """The contestant ready to be timed, and its lead."""
    with contestant.around():
        if kind == "graph" and clock.cuda:
            contestant = Contestant(graph_replay(contestant.call), contestant.around)
        for _ in range(2):
            contestant.call()
        return contestant, clock.lead(contestant.call) if kind == "device" else 0


def _once(clock: Clock, call: Call, lead: int, kind: str) -> float:
    if kind == "host":
        return 1e3 * clock.host(call)
    return clock.device(call, lead, REPLAYS if kind == "graph" else 1)


def free_memory(clock: Clock) -> None:
    """Free the memory of earlier contestants."""
    if clock.cuda:
        gc.collect()
        clock.wait()
        torch.cuda.empty_cache()


def launches(call: Call) -> int | None:
    """Number of kernels and copies that a call starts; None if the profiler cannot count them."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            call()
            torch.cuda.synchronize()
    except (AssertionError, RuntimeError):
        return None
    device_types = [str(event.device_type).rpartition(".")[2] for event in profile.events()]
    return device_types.count("CUDA") or None


def peak_bytes(clock: Clock, contestant: Contestant) -> int | None:
    """Peak bytes of a call beyond those allocated before it; its results count."""
    if not clock.cuda:
        from clam_kernels import testing

        with contestant.around():
            return testing.peak_bytes(contestant.call)
    free_memory(clock)
    with contestant.around():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = contestant.call()
        clock.wait()
        del result
    return torch.cuda.max_memory_allocated() - before
