"""How long one call takes on a device whose caches hold nothing of it.

Candidates are measured together, in rounds: every round takes one sample of each, so that a drift of the clock or the
temperature meets all of them alike, and their medians can be compared. On a GPU a round is

    flush | F  A  F  B  F  ...      F: a CUDA graph of n flushes      A, B: graphs of n times flush, call

and the sample of a candidate is its time less the mean of the two F beside it, over n. Why so:

- **Cold L2.** A served model runs sixty layers between two visits to the same weights; timing with the weights in L2
  measures another problem. What evicts them is a *read* of a buffer much larger than L2: a write would leave dirty
  lines, whose write-back the kernel would then pay for.
- **CUDA graphs.** Serving engines replay graphs at decode sizes. Launch costs of Python would hide the kernels there.
- **n distinct routings per graph.** One routing repeated would be the one whose experts a cache or a TLB remembers.
- **The graph without calls, subtracted.** The flush is as long as a small kernel, so it must go; timing each call by
  events inside the stream would add the cost of the events instead. Both neighbours are used, so that drift cancels.
- **A round is enqueued whole** and waited for once. A device that waits for the host between two marks would count the
  launch of the graph as part of the call: 10 us over n calls is more than the difference between two good kernels.
- **Medians** shrug off the interrupted sample that a mean takes in. Their 95 % interval comes from order statistics
  (the binomial law of how many samples fall below the median): nothing is assumed of the noise, nothing resampled.

A candidate that cannot be captured is timed eagerly, one call a sample, between marks that leave the flush out. So is
everything on a CPU, where a layer's weights exceed the caches anyway and there is no flush.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from workbench import environment
from workbench.environment import Clocks
from workbench.errors import InputError
from workbench.trace import Timing

Call = Callable[[], None]

FLUSH_BYTES = 384 << 20
"""More than seven times the L2 of an H200 (50 MB): its replacement policy keeps lines through a smaller read."""
ROUNDS_PER_CLOCK_READING = 8


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    num_samples: int
    """Samples per candidate."""
    calls_per_sample: int = 6
    """n above: calls per CUDA graph, each with a routing of its own."""
    min_samples: int = 6
    """Taken whatever they cost: the least number whose extremes bound the median at 95 %."""
    seconds_per_candidate: float = math.inf
    """No further sample once a candidate has used this much time (beyond `min_samples`)."""
    give_up_ratio: float = math.inf
    """No further sample once even a candidate's fastest exceeds this multiple of the best median."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "calls_per_sample", "min_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"effort.{name}: expected at least 1, got {getattr(self, name)!r}")


QUICK = Effort(num_samples=12, seconds_per_candidate=0.1)
NORMAL = Effort(num_samples=40, seconds_per_candidate=0.25)
TUNE = Effort(num_samples=20, seconds_per_candidate=0.1, give_up_ratio=1.2)


@dataclass(frozen=True)
class Candidate:
    """One thing to time: a call for each routing, all equally long."""

    label: str
    calls: Sequence[Call]
    graph: bool
    """Whether the calls can be captured in a CUDA graph."""


class Backend(Protocol):
    """What measuring needs of a device. `Mark` is a point in the device's stream of work."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """A replay of `calls` in their order, each preceded by a flush."""

    def capture_flushes(self, count: int) -> Call:
        """A replay of `count` flushes alone; the same one for the same count."""

    def flush(self) -> None:
        """Evict the caches."""

    def mark(self) -> Any:
        """A mark after the work issued so far."""

    def elapsed_us(self, first: Any, second: Any) -> float:
        """Microseconds between two marks, both reached."""

    def wait(self) -> None:
        """Return when the device has done all it was given; raises what went wrong there."""

    def clocks(self) -> Clocks:
        """The device's speed now."""


@dataclass(frozen=True)
class Armed:
    """A candidate warmed up and, where it can be, captured."""

    candidate: Candidate
    replay: Call | None
    """The captured calls with their flushes; None for a candidate timed eagerly."""

    def run(self) -> None:
        """Leave the last call's output behind, made in the way in which it will be timed."""
        run = self.replay or self.candidate.calls[-1]
        run()


def arm(candidate: Candidate, backend: Backend) -> Armed:
    """Run every call once, so that compilers and allocators are done, and capture them.

    Raises whatever the calls raise, so that it can be laid at this candidate's door. Holds graph memory until dropped.
    """
    for call in candidate.calls:
        call()
    backend.wait()
    armed = Armed(candidate, backend.capture(candidate.calls) if candidate.graph else None)
    backend.wait()
    return armed


def measure(armed: Sequence[Armed], backend: Backend, effort: Effort) -> dict[str, Timing]:
    """Time all candidates in interleaved rounds; by label, microseconds per call.

    Raises InputError when captured candidates differ in their number of calls: the flushes between them are shared.
    """
    races = [_Race(each) for each in armed]
    counts = {len(race.calls) for race in races if race.armed.replay} or {0}
    if len(counts) > 1:
        raise InputError(f"candidates: expected captured ones to have equally many calls, got {sorted(counts)}")
    (num_calls,) = counts
    readings: list[Clocks] = []
    for number in range(effort.num_samples):
        best_us = min((statistics.median(race.samples) for race in races if race.samples), default=math.inf)
        running = [race for race in races if race.goes_on(effort, best_us)]
        captured = [race for race in running if race.armed.replay]
        if captured:
            read_clocks = number % ROUNDS_PER_CLOCK_READING == 0
            readings += _captured_round(captured, num_calls, backend, read_clocks)
        for race in running:
            if not race.armed.replay:
                _sample_eagerly(race, backend)
    return {race.armed.candidate.label: _timing(race, readings) for race in races}


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The order statistics that enclose the median of the law behind `samples` with at least 95 % confidence.

    Below six samples no pair does; then it is the whole range.
    """
    ordered = sorted(samples)
    outside, below = 0, 0.0
    while outside < len(ordered) // 2:
        below += math.comb(len(ordered), outside) / 2 ** len(ordered)
        if below > 0.025:
            break
        outside += 1
    skipped = max(outside - 1, 0)
    return ordered[skipped], ordered[len(ordered) - 1 - skipped]


@dataclass
class _Race:
    armed: Armed
    samples: list[float] = dataclasses.field(default_factory=list)
    spent_us: float = 0.0

    @property
    def calls(self) -> Sequence[Call]:
        return self.armed.candidate.calls

    def goes_on(self, effort: Effort, best_us: float) -> bool:
        if len(self.samples) < effort.min_samples:
            return True
        in_time = self.spent_us <= effort.seconds_per_candidate * 1e6
        return in_time and min(self.samples) <= effort.give_up_ratio * best_us


def _captured_round(races: Sequence[_Race], num_calls: int, backend: Backend, read_clocks: bool) -> list[Clocks]:
    """One sample of each captured candidate, as one uninterrupted stretch of work."""
    flushes = backend.capture_flushes(num_calls)
    work = [flushes]
    for race in races:
        assert race.armed.replay is not None
        work += [race.armed.replay, flushes]
    backend.flush()  # keeps the device busy while the host enqueues the rest
    marks = [backend.mark()]
    for replay in work:
        replay()
        marks.append(backend.mark())
    readings = [backend.clocks()] if read_clocks else []
    backend.wait()
    spans = [backend.elapsed_us(first, second) for first, second in itertools.pairwise(marks)]
    for i, race in enumerate(races):
        before, calls, after = spans[2 * i : 2 * i + 3]
        race.samples.append((calls - (before + after) / 2) / num_calls)
        race.spent_us += before + calls
    return readings


def _sample_eagerly(race: _Race, backend: Backend) -> None:
    call = race.calls[len(race.samples) % len(race.calls)]
    backend.flush()
    start = backend.mark()
    call()
    end = backend.mark()
    backend.wait()
    race.samples.append(backend.elapsed_us(start, end))
    race.spent_us += race.samples[-1]


def _timing(race: _Race, readings: Sequence[Clocks]) -> Timing:
    low, high = median_interval(race.samples)
    return Timing(
        median_us=statistics.median(race.samples),
        low_us=low,
        high_us=high,
        num_samples=len(race.samples),
        num_routings=len(race.calls),
        graph=race.armed.replay is not None,
        sm_clock_mhz=round(statistics.median(reading.sm_mhz for reading in readings)) if readings else 0,
        throttle_reasons=",".join(sorted({reason for reading in readings for reason in reading.throttle_reasons})),
    )


def backend_of(device: torch.device) -> Backend:
    """The backend that times work on `device`."""
    return CudaBackend(device) if device.type == "cuda" else CpuBackend()


class CpuBackend:
    """Wall time of work that is done when its call returns."""

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock_ns = clock_ns

    def capture(self, calls: Sequence[Call]) -> Call:
        raise InputError("candidate.graph: expected False on a CPU, got True")

    def capture_flushes(self, count: int) -> Call:
        return self.capture([self.flush] * count)

    def flush(self) -> None:
        pass

    def mark(self) -> int:
        return self._clock_ns()

    def elapsed_us(self, first: int, second: int) -> float:
        return (second - first) / 1e3

    def wait(self) -> None:
        pass

    def clocks(self) -> Clocks:
        return Clocks()


class CudaBackend:
    """Events and graphs on the current stream of one GPU. Holds the flush buffer and the memory pool of its graphs.

    Make one per measurement: what its graphs allocated is given back when it and they are dropped.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # fp32 and not an integer: torch widens integers before it sums them, and would write that copy.
        self._buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._total = torch.zeros((), dtype=torch.float32, device=device)
        # Replays never overlap and nothing that one leaves in the pool is read by another, so all can share it.
        self._pool = torch.cuda.graph_pool_handle()
        self._flushes: dict[int, Call] = {}
        self.flush()
        # A pool that has lost its last graph cannot be captured into again; this one stays when a capture fails.
        self.capture_flushes(1)

    def capture(self, calls: Sequence[Call]) -> Call:
        return self._capture([step for call in calls for step in (self.flush, call)])

    def capture_flushes(self, count: int) -> Call:
        if count not in self._flushes:
            self._flushes[count] = self._capture([self.flush] * count)
        return self._flushes[count]

    def _capture(self, steps: Sequence[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for step in steps:
                step()
        return graph.replay  # a bound method: keeps the graph

    def flush(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._total)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) * 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def clocks(self) -> Clocks:
        return environment.clocks(self._device)
