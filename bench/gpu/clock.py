# SPDX-License-Identifier: Apache-2.0
"""Times of calls that run in alternation: events on a GPU, the wall clock for its stand-in."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Several times any second-level cache that a GPU of today has.
FLUSH_BYTES = 256 << 20
# Cycles a second of a spinning GPU; only how long the host may run ahead depends on it.
CYCLES = 2.0e9
LONGEST_PAUSE = 5e-3
REPLAYS = 20

Call = Callable[[], Any]
Around = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contestant:
    """A call, and the context (a forced backend, a mode of torch's products) it runs in."""

    call: Call
    around: Around = contextlib.nullcontext


@dataclass
class Times:
    """Milliseconds of each round, or why there are none."""

    ms: list[float]
    reason: str | None = None

    def quantile(self, share: float) -> float | None:
        ordered = sorted(self.ms)
        return ordered[round(share * (len(ordered) - 1))] if ordered else None


class Clock:
    """Measures one call at a time on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.trash = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def host(self, call: Call) -> float:
        """Wall seconds of a call until the device is done with it."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def lead(self, call: Call) -> int:
        """Cycles that the device must spin so that the host has queued a call before it starts:
        else the time of a short call would be that of its launches.
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
        """Milliseconds of a call on the device, with nothing of it left in the second-level
        cache.
        """
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
    """Torch's own float32 products in tf32, as a user of "high" has them."""
    return products("high")


@contextlib.contextmanager
def products(mode: str) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def captured(call: Call) -> Call:
    """A call as the replay of a CUDA graph, warmed up on a stream of its own as capture wants."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()

    def replay() -> Any:
        graph.replay()
        return held

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
    found = {name: Times([]) for name in contestants}
    calls: dict[str, tuple[Contestant, int]] = {}
    for name, one in contestants.items():
        try:
            calls[name] = _warm(clock, one, kind)
        except Exception as error:  # whatever a rival dies of is a fact of the table
            found[name].reason = f"{type(error).__name__}: {error}"[:300]
        tidy(clock)
    names = list(calls)
    for turn in range(rounds):
        if turn >= 5 and time.monotonic() > ends:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            one, lead = calls[name]
            with one.around():
                found[name].ms.append(_once(clock, one.call, lead, kind))
    return found


def _warm(clock: Clock, one: Contestant, kind: str) -> tuple[Contestant, int]:
    """The contestant ready to be timed, and its lead."""
    with one.around():
        if kind == "graph" and clock.cuda:
            one = Contestant(captured(one.call), one.around)
        for _ in range(2):
            one.call()
        return one, clock.lead(one.call) if kind == "device" else 0


def _once(clock: Clock, call: Call, lead: int, kind: str) -> float:
    if kind == "host":
        return 1e3 * clock.host(call)
    return clock.device(call, lead, REPLAYS if kind == "graph" else 1)


def tidy(clock: Clock) -> None:
    """Give memory that a dead contestant held to the next."""
    if clock.cuda:
        gc.collect()
        clock.wait()
        torch.cuda.empty_cache()


def launches(call: Call) -> int | None:
    """How many kernels and copies a call starts; None where the profiler cannot tell."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            call()
            torch.cuda.synchronize()
    except (AssertionError, RuntimeError):
        return None
    found = [str(event.device_type).rpartition(".")[2] for event in profile.events()]
    return found.count("CUDA") or None


def peak_bytes(clock: Clock, one: Contestant) -> int | None:
    """Most bytes that a call holds beside what lay there before it, its results among them."""
    if not clock.cuda:
        from clam_kernels import testing

        with one.around():
            return testing.peak_bytes(one.call)
    tidy(clock)
    with one.around():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        held = one.call()
        clock.wait()
        del held
    return torch.cuda.max_memory_allocated() - before
