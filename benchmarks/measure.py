"""Time and memory of zero-argument calls. The runner says which calls; nothing here knows what they compute."""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

SHORTEST_TIMING = 1e-3  # seconds; shorter ones drown in the clock's and the scheduler's noise
WARM_UP = 0.05  # seconds and calls: caches, allocator, thread pool, the processor's clock
WARM_UP_CALLS = 3
FEWEST_ROUNDS = 5
FEWEST_LONG_ROUNDS = 3
MOST_ROUNDS = 1000
MOST_FLUSHED_CALLS = 20
L2_FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU of today


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all rounds: median, minimum and quartiles."""

    median: float
    min: float
    q1: float
    q3: float
    rounds: int
    calls_per_round: int

    @classmethod
    def of(cls, samples: list[float], calls: int) -> Timing:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return cls(median, min(samples), q1, q3, len(samples), calls)

    def per(self, units: int) -> Timing:
        """The seconds of each of the `units` that one call does."""
        return replace(self, median=self.median / units, min=self.min / units, q1=self.q1 / units, q3=self.q3 / units)

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


class Clock(Protocol):
    def seconds_per_call(self, call: Call, calls: int) -> float: ...


class WallClock:
    """Time until the results are there, or, on a GPU, until the last of `calls` calls is done."""

    def __init__(self, device: torch.device):
        self._synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing

    def seconds_per_call(self, call: Call, calls: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in repeat(None, calls):
            call()
        self._synchronize()
        return (time.perf_counter() - start) / calls


class EventClock:
    """Time on the GPU, each call with a cold L2: flushing it also hides what launching the call costs the CPU."""

    def __init__(self, device: torch.device):
        self._flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def seconds_per_call(self, call: Call, calls: int) -> float:
        calls = min(calls, MOST_FLUSHED_CALLS)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def _nothing() -> None:
    pass


def clock(device: torch.device, *, overhead: bool = False) -> Clock:
    return EventClock(device) if device.type == "cuda" and not overhead else WallClock(device)


def _settle_allocator() -> None:
    """Free a large block once, as any process has that has trained for a step.

    glibc gives memory back to the system when more of it is free than twice the largest block that was ever freed (of
    at most 32 MB). Before a large one was, results of some megabytes are new pages at every call, and whoever allocates
    them is charged with zeroing them: a third of the time of normalising a discriminator's weights.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _calls_per_round(call: Call, clock: Clock) -> int:
    """Warm up, and find how many calls make one timing long enough."""
    start = time.perf_counter()
    seconds: list[float] = []
    while len(seconds) < WARM_UP_CALLS or time.perf_counter() - start < WARM_UP:
        seconds.append(clock.seconds_per_call(call, 1))
    # The fastest: a moment when another process has the processor must not turn into one call per round.
    return max(1, math.ceil(SHORTEST_TIMING / max(min(seconds), 1e-8)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def measure(
    calls: Mapping[str, Call],
    seconds: float,
    clock: Clock,
    progress: Callable[[float], None] = lambda fraction: None,
    *,
    long: bool = False,
) -> dict[str, Timing]:
    """Time all calls in turn, A B C A B C ..., for about `seconds`, so that a busy moment hits everyone alike.

    `long` calls are warm already, one of them makes a round, and few rounds do.
    """
    if not calls:
        return {}
    _settle_allocator()
    batch = {name: 1 if long else _calls_per_round(call, clock) for name, call in calls.items()}
    fewest = FEWEST_LONG_ROUNDS if long else FEWEST_ROUNDS
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    with _no_garbage_collection():
        for done in range(1, MOST_ROUNDS + 1):
            for name, call in calls.items():
                samples[name].append(clock.seconds_per_call(call, batch[name]))
            elapsed = time.perf_counter() - start
            progress(min(1.0, elapsed / seconds))
            if done >= fewest and elapsed >= seconds:
                break
    return {name: Timing.of(samples[name], batch[name]) for name in calls}


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """torch 2.13's profiler prints "USDT:... profiler_start" to stderr below Python, whatever KINETO_LOG_LEVEL says."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _peak_bytes_cpu(call: Call) -> int:
    """The highest running sum of what torch's CPU allocator gave and took back, in the order it happened."""
    with (
        _silent_profiler(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        outputs = call()
    del outputs
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _peak_bytes_cuda(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del outputs
    return peak


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak of the tensor memory that one call allocates, its outputs included, its inputs not.

    What a kernel takes from elsewhere (malloc, another library's pool) is not seen by torch's allocators.
    """
    return _peak_bytes_cuda(call, device) if device.type == "cuda" else _peak_bytes_cpu(call)


def process_bytes(field: str) -> int:
    """Bytes of a line of /proc/self/status. Unlike getrusage's, VmHWM does not begin with the parent's peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def copy_call(size: int, device: torch.device) -> tuple[Call, int]:
    """A copy into warm memory that moves about `size` bytes (read + written), and the bytes it moves."""
    elements = max(1, min(size, 1 << 30) // 8)
    source = torch.ones(elements, device=device)
    target = torch.zeros_like(source)
    return (lambda: target.copy_(source)), 2 * target.nbytes


def gemm_call(flops: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, int]:
    """A square matrix product of about `flops`, between sizes that reach the library's rate, and its flops."""
    side = min(4096, max(256, round((flops / 2) ** (1 / 3))))
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    return (lambda: torch.mm(a, b, out=out)), 2 * side**3
