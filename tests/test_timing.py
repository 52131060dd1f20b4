"""What is measured is the calls: not the flushes, not the drift, not the outliers. A fake device tells the time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import comb

import pytest
import torch

from workbench import timing
from workbench.environment import Clocks
from workbench.errors import InputError
from workbench.timing import Armed, Candidate, CpuBackend, Effort, arm, measure, median_interval

FLUSH_US = 100.0


class FakeDevice:
    """A backend whose time advances by what runs on it, multiplied by `drift(now)`."""

    def __init__(self, drift: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.waits = 0
        self._drift = drift

    def work(self, name: str, microseconds: float) -> Callable[[], None]:
        """A call that takes that long."""

        def call() -> None:
            self.log.append(name)
            self.now += microseconds * self._drift(self.now)

        return call

    def capture(self, calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
        def replay() -> None:
            for call in calls:
                self.flush()
                call()

        return replay

    def capture_flushes(self, count: int) -> Callable[[], None]:
        def replay() -> None:
            for _ in range(count):
                self.flush()

        return replay

    def flush(self) -> None:
        self.work("flush", FLUSH_US)()

    def mark(self) -> float:
        return self.now

    def elapsed_us(self, first: float, second: float) -> float:
        return second - first

    def wait(self) -> None:
        self.waits += 1

    def clocks(self) -> Clocks:
        return Clocks(1980, ("SwPowerCap",))


def candidates(device: FakeDevice, graph: bool = True, **microseconds: float) -> list[Armed]:
    return [
        arm(Candidate(name, [device.work(name, each)] * 3, graph), device) for name, each in microseconds.items()
    ]  # fmt: skip


def test_the_flush_is_not_part_of_a_captured_call() -> None:
    device = FakeDevice()
    (measured,) = measure(candidates(device, a=7.0), device, Effort(num_samples=9)).values()
    assert measured.median_us == pytest.approx(7.0)
    assert (measured.num_samples, measured.num_routings, measured.graph) == (9, 3, True)
    assert (measured.sm_clock_mhz, measured.throttle_reasons) == (1980, "SwPowerCap")


def test_the_flush_is_not_part_of_an_eager_call_and_routings_take_turns() -> None:
    device = FakeDevice()
    calls = [device.work(str(i), 5.0 + i) for i in range(3)]
    armed = arm(Candidate("eager", calls, graph=False), device)
    device.log.clear()
    measured = measure([armed], device, Effort(num_samples=6))["eager"]
    assert device.log == ["flush", "0", "flush", "1", "flush", "2"] * 2
    assert measured.median_us == pytest.approx(6.0)
    assert measured.graph is False


def test_every_call_meets_a_cold_cache() -> None:
    device = FakeDevice()
    armed = candidates(device, a=1.0, b=2.0)
    device.log.clear()
    measure(armed, device, Effort(num_samples=2))
    assert all(before == "flush" for before, call in itertools.pairwise(device.log) if call != "flush")


def test_candidates_take_turns_so_that_a_drift_meets_both() -> None:
    """A device that slows down by half during the run shows the ratio of the candidates all the same."""
    device = FakeDevice(drift=lambda now: 1.0 + now / 2e5)
    measured = measure(candidates(device, a=30.0, b=60.0), device, Effort(num_samples=50))
    assert device.log.index("b") < len(device.log) - device.log[::-1].index("a")
    assert measured["b"].median_us / measured["a"].median_us == pytest.approx(2.0, rel=0.02)


def test_a_drift_of_the_flush_is_not_blamed_on_the_call() -> None:
    """Each sample is held against the flushes on both sides: at 1 % per millisecond the error stays below that."""
    device = FakeDevice(drift=lambda now: 1.0 + now * 1e-5)
    armed = candidates(device, a=20.0)
    start = device.now
    (measured,) = measure(armed, device, Effort(num_samples=1)).values()
    slowed = 20.0 * (1.0 + (start + device.now) / 2 * 1e-5)
    assert measured.median_us == pytest.approx(slowed, rel=0.01)


def test_a_round_of_captured_candidates_is_waited_for_once() -> None:
    device = FakeDevice()
    armed = candidates(device, a=1.0, b=2.0, c=3.0)
    device.waits = 0
    measure(armed, device, Effort(num_samples=5))
    assert device.waits == 5


def test_outliers_do_not_move_the_median() -> None:
    device = FakeDevice()
    interruptions = itertools.cycle([0.0] * 4 + [1000.0])

    def call() -> None:
        device.now += 10.0 + next(interruptions)

    measured = measure([arm(Candidate("a", [call], graph=True), device)], device, Effort(num_samples=25))["a"]
    assert measured.median_us == pytest.approx(10.0)
    assert measured.high_us == pytest.approx(10.0)


def test_a_candidate_that_used_up_its_time_stops_after_the_least_number_of_samples() -> None:
    device = FakeDevice()
    effort = Effort(num_samples=40, min_samples=6, seconds_per_candidate=0.1)
    measured = measure(candidates(device, slow=50_000.0, quick=10.0), device, effort)
    assert (measured["slow"].num_samples, measured["quick"].num_samples) == (6, 40)


def test_a_candidate_that_is_clearly_slower_is_given_up() -> None:
    device = FakeDevice()
    effort = Effort(num_samples=40, min_samples=6, give_up_ratio=1.2)
    measured = measure(candidates(device, best=10.0, near=11.9, far=12.1), device, effort)
    assert [measured[name].num_samples for name in ("best", "near", "far")] == [40, 40, 6]


def test_captured_candidates_of_unequal_length_are_refused() -> None:
    device = FakeDevice()
    armed = [arm(Candidate(str(n), [device.work("call", 1.0)] * n, graph=True), device) for n in (2, 3)]
    with pytest.raises(InputError, match=r"expected captured ones to have equally many calls, got \[2, 3\]"):
        measure(armed, device, Effort(num_samples=1))


def test_arming_runs_every_call_and_passes_on_what_it_raises() -> None:
    device = FakeDevice()

    def broken() -> None:
        raise ValueError("no such tile")

    with pytest.raises(ValueError, match="no such tile"):
        arm(Candidate("b", [device.work("first", 1.0), broken], graph=True), device)
    assert device.log == ["first"]


def test_running_what_is_armed_leaves_the_output_of_the_last_call() -> None:
    device = FakeDevice()
    for graph in (True, False):
        armed = arm(Candidate("a", [device.work(name, 1.0) for name in "xyz"], graph), device)
        device.log.clear()
        armed.run()
        assert device.log[-1] == "z"


@pytest.mark.parametrize("count", [6, 7, 12, 20, 39, 40])
def test_the_interval_is_the_narrowest_pair_of_order_statistics_that_covers_95_percent(count: int) -> None:
    samples = [float(i) for i in range(count)]
    low, high = median_interval(samples[::-1])
    outside = int(low)
    assert high == count - 1 - outside

    def coverage(skipped: int) -> float:
        return 1 - 2 * sum(comb(count, i) for i in range(skipped + 1)) / 2**count

    assert coverage(outside) >= 0.95
    assert coverage(outside + 1) < 0.95


@pytest.mark.parametrize("samples", [[3.0], [3.0, 1.0], [5.0, 1.0, 2.0, 4.0, 3.0]])
def test_too_few_samples_for_an_interval_give_their_range(samples: list[float]) -> None:
    assert median_interval(samples) == (min(samples), max(samples))


@pytest.mark.parametrize("field", ["num_samples", "calls_per_sample", "min_samples"])
def test_an_effort_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"effort.{field}: expected at least 1, got 0"):
        Effort(**{"num_samples": 1, field: 0})


def test_a_cpu_is_timed_by_its_clock() -> None:
    ticks = itertools.count(0, 2500)
    backend = CpuBackend(clock_ns=lambda: next(ticks))
    (measured,) = measure(
        [arm(Candidate("a", [lambda: None], False), backend)], backend, Effort(num_samples=3)
    ).values()
    assert (measured.median_us, measured.graph, measured.sm_clock_mhz) == (2.5, False, 0)


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(InputError, match="expected False on a CPU"):
        arm(Candidate("a", [lambda: None], graph=True), CpuBackend())


@pytest.mark.gpu
def test_repeated_runs_of_one_kernel_agree_within_two_percent(device: torch.device) -> None:
    """A product that takes well over 20 us, measured five times from scratch."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(a)
    medians = []
    for _ in range(5):
        backend = timing.backend_of(device)
        armed = arm(Candidate("product", [lambda: torch.mm(a, a, out=out)] * 6, graph=True), backend)
        medians.append(measure([armed], backend, timing.NORMAL)["product"].median_us)
    assert min(medians) > 20
    assert max(medians) / min(medians) < 1.02, medians


@pytest.mark.gpu
def test_reading_more_than_l2_holds_takes_as_long_in_a_graph_as_eagerly(device: torch.device) -> None:
    source = torch.zeros(64 << 20, device=device)  # 256 MiB
    total = torch.zeros((), device=device)
    backend = timing.backend_of(device)
    armed = [
        arm(Candidate(label, [lambda: torch.sum(source, dim=0, out=total)] * 6, graph), backend)
        for label, graph in (("graph", True), ("eager", False))
    ]
    measured = measure(armed, backend, timing.NORMAL)
    assert measured["graph"].median_us == pytest.approx(measured["eager"].median_us, rel=0.1)
    assert 40 < measured["graph"].median_us < 200
    assert measured["graph"].sm_clock_mhz > 0


@pytest.mark.gpu
def test_what_the_graphs_allocated_is_given_back(device: torch.device) -> None:
    def once() -> None:
        backend = timing.backend_of(device)
        armed = arm(Candidate("a", [lambda: torch.empty(64 << 20, device=device).zero_()] * 4, graph=True), backend)
        measure([armed], backend, timing.QUICK)

    reserved = []
    for _ in range(3):
        once()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved(device))
    assert len(set(reserved)) == 1, reserved
