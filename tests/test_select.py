"""The choice: the default unless something verified is faster beyond the noise."""

from __future__ import annotations

import dataclasses
import logging
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import CPU, HERE, SHAPE, key, named, timed, variant, verified

from workbench.errors import UnsupportedError
from workbench.problem import MoEShape
from workbench.select import Choice, Verdict, choose, judge
from workbench.table import Cell, build
from workbench.trace import Status, Timing, Trace
from workbench.variant import Config, Variant

FUSED = variant("cuda.sm90_fused", 3)
GROUPED = variant("triton.grouped", 3)
LOOP = variant("torch.loop")
NEVER_MEASURED = variant("torch.grouped")
VARIANTS = named(FUSED, GROUPED, LOOP, NEVER_MEASURED)
KERNEL = Cell(SHAPE, "uniform", "bf16", "kernel")


def chosen(traces: list[Trace], num_tokens: int = 8, variants: dict[str, Variant] = VARIANTS) -> Choice:
    return choose(build(traces, HERE, variants), KERNEL, num_tokens, variants, CPU)


def timing(median_us: float, low_us: float, high_us: float) -> Timing:
    return Timing(median_us, low_us, high_us, 20, 6, graph=True)


def right(of: Variant, config: int | Config, num_tokens: int, median_us: float, noise: float = 0.01) -> list[Trace]:
    """Verified, and timed."""
    measured = key(of, config, num_tokens)
    return [verified(measured), timed(measured, median_us, noise)]


@pytest.mark.parametrize(
    ("of", "verdict"),
    [
        (timing(8, 7, 9), Verdict.FASTER),
        (timing(14, 13, 15), Verdict.SLOWER),
        (timing(10.1, 9.9, 10.4), Verdict.SAME),
        (timing(11.5, 10.8, 12.5), Verdict.AMBIGUOUS),
    ],
)
def test_a_difference_is_called_what_its_intervals_allow(of: Timing, verdict: Verdict) -> None:
    assert judge(of, timing(10, 9.5, 11)) is verdict


def test_the_fastest_verified_candidate_beyond_the_noise_is_chosen() -> None:
    choice = chosen([*right(FUSED, 0, 8, 10.0), *right(FUSED, 1, 8, 8.0), *right(GROUPED, 0, 8, 9.0)])
    assert choice.identity == ("cuda.sm90_fused", Config(block_m=1))
    assert not choice.untuned
    assert "1.25x" in choice.reason


def test_the_default_wins_a_tie() -> None:
    choice = chosen([*right(FUSED, 0, 8, 10.0, noise=0.05), *right(FUSED, 1, 8, 9.5, noise=0.05)])
    assert choice.identity == ("cuda.sm90_fused", Config(block_m=0))
    ((_, why),) = [(one, why) for one, why in choice.candidates if one.config == Config(block_m=1)]
    assert "within the noise of the default" in why


def test_a_faster_candidate_that_is_wrong_is_never_chosen_and_the_reason_says_so() -> None:
    wrong = key(GROUPED)
    choice = chosen([*right(FUSED, 0, 8, 10.0), verified(wrong, Status.WRONG), timed(wrong, 1.0)])
    assert choice.variant == "cuda.sm90_fused"
    assert ("triton.grouped", "wrong: so the test says") in [(one.variant, why) for one, why in choice.candidates]


def test_a_faster_candidate_that_nobody_verified_is_never_chosen() -> None:
    choice = chosen([*right(FUSED, 0, 8, 10.0), timed(key(GROUPED), 1.0)])
    assert choice.variant == "cuda.sm90_fused"
    assert any(why.startswith("unverified") for _, why in choice.candidates)


def test_wrong_for_quantised_tokens_is_not_trusted_with_bf16_ones() -> None:
    fp8 = verified(key(GROUPED, input_kind="fp8"), Status.WRONG)
    assert chosen([*right(FUSED, 0, 8, 10.0), *right(GROUPED, 0, 8, 1.0), fp8]).variant == "cuda.sm90_fused"


def test_wrong_on_one_seed_is_wrong_whatever_others_show() -> None:
    wrong = dataclasses.replace(verified(key(GROUPED), Status.WRONG), seed=1)
    later = verified(key(GROUPED), created="2026-02-01T00:00:00+00:00")
    assert chosen([*right(FUSED, 0, 8, 10.0), wrong, later, timed(key(GROUPED), 1.0)]).variant == "cuda.sm90_fused"


def test_a_red_default_gives_way_to_the_next_in_the_order() -> None:
    crashed = Trace("bench", Status.CRASHED, key(FUSED), scope="kernel", message="illegal address")
    traces = [verified(key(FUSED)), crashed, *right(LOOP, 0, 8, 20.0), *right(GROUPED, 0, 8, 19.9, noise=0.05)]
    assert chosen(traces).variant == "triton.grouped"


def test_of_two_measurements_of_one_thing_the_later_counts() -> None:
    old, new = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
    traces = [verified(key(GROUPED)), timed(key(GROUPED), 1.0, created=old), timed(key(GROUPED), 99.0, created=new)]
    assert chosen([*right(FUSED, 0, 8, 10.0), *traces]).variant == "cuda.sm90_fused"


@pytest.mark.parametrize("field", ["device", "driver", "cuda", "torch", "triton", "cupy"])
def test_a_record_of_another_environment_is_a_miss(field: str) -> None:
    elsewhere = dataclasses.replace(HERE, **{field: "another"})
    of = key(GROUPED, environment=elsewhere)
    assert not chosen([verified(of), timed(of, 1.0)]).measured


def test_a_record_of_other_sources_is_a_miss() -> None:
    of = key(GROUPED, sources="0" * 16)
    assert not chosen([verified(of), timed(of, 1.0)]).measured


def test_a_miss_takes_the_first_supported_variant_and_logs_the_command_once(caplog: pytest.LogCaptureFixture) -> None:
    variants = named(variant("cuda.sm90_fused", reason="no GPU"), GROUPED, LOOP)
    cell = dataclasses.replace(KERNEL, routing="zipf:1.7")
    table = build([], HERE, variants)
    with caplog.at_level(logging.WARNING):
        choices = [choose(table, cell, num_tokens, variants, CPU) for num_tokens in (1, 2, 1)]
    assert {choice.identity for choice in choices} == {("triton.grouped", Config(block_m=0))}
    assert len(caplog.messages) == 1
    assert "workbench tune --E 8 --N 256 --K 256 --top-k 2 --no-shared-expert --routing zipf:1.7" in caplog.text


@pytest.mark.parametrize(
    ("shape", "num_tokens", "expected"),
    [
        (MoEShape(257, 7168, 128, 9, num_shared_experts=1), 1, "sm90_stream_in_place"),
        (MoEShape(257, 7168, 128, 9, num_shared_experts=1), 2048, "sm90_stream_in_place"),
        (MoEShape(257, 7168, 128, 9, num_shared_experts=1), 4096, "sm90_prefill"),
        (MoEShape(8, 4096, 1792, 2), 24, "sm90_fused"),  # few experts
        (MoEShape(8, 4096, 1792, 2), 256, "sm90_prefill"),
        (MoEShape(128, 2048, 768, 8), 24, "sm90_stream_in_place"),
        (MoEShape(128, 2048, 768, 8), 96, "sm90_fused"),  # small experts, wide for their size
        (MoEShape(129, 5120, 512, 2, num_shared_experts=1), 3, "sm90_fused"),  # 16 chunks of channels in all
        (MoEShape(129, 5120, 512, 2, num_shared_experts=1), 24, "sm90_stream_in_place"),
        (MoEShape(64, 8192, 1792, 8), 24, "sm90_stream_in_place"),
        (MoEShape(64, 8192, 1792, 8), 150, "sm90_prefill"),  # wide
        (MoEShape(128, 4096, 192, 8), 4096, "sm90_stream_in_place"),  # no other kernel serves it in place
    ],
    ids=str,
)
def test_a_miss_takes_what_suits_the_rows_of_an_expert_and_never_one_that_copies_weights(
    shape: MoEShape, num_tokens: int, expected: str
) -> None:
    names = ("cuda.sm90_stream", "cuda.sm90_stream_in_place", "cuda.sm90_prefill", "cuda.sm90_fused")
    reason = "I must be a multiple of 128" if shape.intermediate_size % 128 else ""
    everything = named(*(variant(name, reason="" if "stream" in name else reason) for name in names), GROUPED, LOOP)
    cell = dataclasses.replace(KERNEL, shape=shape)
    choice = choose(build([], HERE, everything), cell, num_tokens, everything, CPU)
    assert (choice.variant, choice.measured) == (f"cuda.{expected}", False)


def test_a_miss_takes_one_that_copies_weights_where_all_that_can_run_do() -> None:
    names = (FUSED.name, GROUPED.name, "cuda.sm90_stream_in_place")
    refusing = [variant(name, reason="I must be a multiple of 16") for name in names]
    everything = named(variant("cuda.sm90_stream"), *refusing, NEVER_MEASURED, LOOP)
    assert {chosen([], num_tokens, everything).variant for num_tokens in (1, 4096)} == {"cuda.sm90_stream"}


def test_measured_candidates_are_held_against_the_same_default_at_every_batch_size() -> None:
    prefill = variant("cuda.sm90_prefill")
    traces = [*right(FUSED, 0, 4096, 10.0, noise=0.05), *right(prefill, 0, 4096, 9.9, noise=0.05)]
    assert chosen(traces, 4096, named(FUSED, prefill)).variant == "cuda.sm90_fused"


def test_a_miss_passes_over_a_variant_recorded_red_on_the_shape() -> None:
    assert chosen([verified(key(FUSED, num_tokens=64), Status.CRASHED)]).variant == "triton.grouped"


def test_no_supported_variant_is_an_error_with_every_reason() -> None:
    variants = named(variant("torch.loop", reason="I must be even"))
    with pytest.raises(UnsupportedError, match=r"torch\.loop: I must be even"):
        chosen([], variants=variants)


def test_between_two_measured_batches_that_agree_their_choice_holds() -> None:
    traces = [one for at in (8, 32) for one in right(FUSED, 0, at, 10.0) + right(GROUPED, 1, at, 5.0)]
    assert chosen(traces, 16).identity == ("triton.grouped", Config(block_m=1))


@pytest.mark.parametrize(("num_tokens", "expected"), [(9, "cuda.sm90_fused"), (60, "triton.grouped")])
def test_between_batches_that_disagree_the_smaller_interpolated_time_wins(num_tokens: int, expected: str) -> None:
    traces = [*right(FUSED, 0, 8, 10.0), *right(GROUPED, 0, 8, 20.0)]
    traces += [*right(FUSED, 0, 64, 80.0), *right(GROUPED, 0, 64, 40.0)]
    assert chosen(traces, num_tokens).variant == expected


def test_interpolation_is_linear_in_log_time_over_log_tokens() -> None:
    traces = [*right(FUSED, 0, 4, 10.0), *right(GROUPED, 0, 4, 20.0)]
    traces += [*right(FUSED, 0, 64, 1000.0), *right(GROUPED, 0, 64, 500.0)]
    choice = chosen(traces, 16)
    figures = {one.variant: one.timing.median_us for one, _ in choice.candidates if one.timing}
    assert figures == {"cuda.sm90_fused": pytest.approx(100.0), "triton.grouped": pytest.approx(100.0)}
    assert choice.variant == "cuda.sm90_fused"


def test_a_variant_measured_at_one_neighbour_only_loses() -> None:
    traces = [*right(FUSED, 0, 8, 10.0), *right(FUSED, 0, 64, 80.0), *right(GROUPED, 0, 64, 1.0)]
    choice = chosen(traces, 60)
    assert choice.variant == "cuda.sm90_fused"
    assert ("triton.grouped", "untimed: not measured at both neighbours") in [
        (one.variant, why) for one, why in choice.candidates
    ]


def test_between_batches_whose_configs_differ_the_variant_is_followed_and_takes_the_nearer_config() -> None:
    by_size = variant("triton.grouped", configs=lambda num_tokens: [Config(block_m=num_tokens), Config(block_m=128)])
    variants = named(by_size, LOOP)
    traces = [one for at in (8, 64) for one in right(by_size, Config(block_m=at), at, 10.0) + right(LOOP, 0, at, 90.0)]
    assert chosen(traces, 16, variants).config == Config(block_m=16)
    tuned = [*traces, *right(by_size, Config(block_m=128), 8, 5.0), *right(by_size, Config(block_m=1), 64, 5.0)]
    assert chosen(tuned, 9, variants).identity == ("triton.grouped", Config(block_m=128))
    assert chosen(tuned, 63, variants).identity == ("triton.grouped", Config(block_m=1))


@pytest.mark.parametrize(("num_tokens", "end"), [(0, 8), (1, 8), (4096, 64)])
def test_outside_the_measured_range_the_end_decides_and_is_named(num_tokens: int, end: int) -> None:
    traces = [*right(FUSED, 0, 8, 10.0), *right(GROUPED, 1, 8, 5.0), *right(FUSED, 0, 64, 10.0)]
    choice = chosen(traces, num_tokens)
    assert choice.variant == ("triton.grouped" if end == 8 else "cuda.sm90_fused")
    assert f"outside the measured range, as at its end M={end}" in choice.reason


statuses = st.sampled_from([Status.PASSED, Status.WRONG, Status.CRASHED, None])
measurements = st.lists(
    st.tuples(
        st.sampled_from([FUSED, GROUPED, LOOP]),
        st.integers(0, 2),
        st.sampled_from([4, 16, 64]),
        st.floats(1.0, 1000.0),
        st.floats(0.0, 0.3),
        statuses,
    ),
    max_size=20,
)


def as_traces(drawn: list[tuple[Variant, int, int, float, float, Status | None]]) -> list[Trace]:
    traces = []
    for of, config, num_tokens, median_us, noise, status in drawn:
        traces.append(timed(key(of, config, num_tokens), median_us, noise))
        if status is not None:
            traces.append(verified(key(of, config, num_tokens), status))
    return traces


@settings(max_examples=60, deadline=None)
@given(measurements, st.integers(0, 100))
def test_the_choice_is_never_slower_than_the_default_beyond_the_noise(drawn: list, num_tokens: int) -> None:
    choice = chosen(as_traces(drawn), num_tokens)
    if not choice.measured or choice.default is None:
        return
    ((winner, _),) = [(one, why) for one, why in choice.candidates if not why]
    assert winner.identity == choice.identity
    assert winner.status == Status.PASSED
    assert winner is choice.default or judge(winner.timing, choice.default.timing) is Verdict.FASTER


@settings(max_examples=60, deadline=None)
@given(measurements, st.integers(0, 100), st.randoms(use_true_random=False))
def test_the_order_of_the_traces_changes_nothing(drawn: list, num_tokens: int, shuffle: random.Random) -> None:
    traces = as_traces(drawn)
    shuffled = list(traces)
    shuffle.shuffle(shuffled)
    assert chosen(traces, num_tokens) == chosen(shuffled, num_tokens)


NOISE = 0.01
MEASURED_TOKENS = (1, 2, 8, 64, 256, 1024)


@st.composite
def rising_times(draw: st.DrawFn) -> list[float]:
    """Times of one variant at MEASURED_TOKENS, none less than the one before."""
    steps = [draw(st.floats(1.0, 3.0)) for _ in MEASURED_TOKENS[1:]]
    times = [draw(st.floats(5.0, 50.0))]
    for step in steps:
        times.append(times[-1] * step)
    return times


def predicted(times: list[float], num_tokens: int) -> float:
    """On a straight line between the measured neighbours, time and M in logarithms."""
    logs = [math.log(at) for at in MEASURED_TOKENS]
    above = next(i for i, at in enumerate(MEASURED_TOKENS) if at >= num_tokens)
    if MEASURED_TOKENS[above] == num_tokens:
        return times[above]
    weight = (math.log(num_tokens) - logs[above - 1]) / (logs[above] - logs[above - 1])
    return times[above - 1] ** (1 - weight) * times[above] ** weight


@settings(max_examples=60, deadline=None)
@given(st.tuples(rising_times(), rising_times(), rising_times()))
def test_between_measured_batch_sizes_there_is_no_cliff(all_times: tuple[list[float], ...]) -> None:
    """What is chosen never takes longer than the default beyond the noise, and no larger batch takes less time."""
    times = dict(zip(("cuda.sm90_fused", "triton.grouped", "torch.loop"), all_times, strict=True))
    traces = [
        trace
        for of in (FUSED, GROUPED, LOOP)
        for at, median_us in zip(MEASURED_TOKENS, times[of.name], strict=True)
        for trace in right(of, 0, at, median_us, NOISE)
    ]
    before = 0.0
    for num_tokens in (*range(1, 24), *range(24, MEASURED_TOKENS[-1] + 1, 25), MEASURED_TOKENS[-1]):
        choice = chosen(traces, num_tokens)
        now = predicted(times[choice.variant], num_tokens)
        assert now <= predicted(times["cuda.sm90_fused"], num_tokens) * (1 + 3 * NOISE), choice.reason
        assert now >= before * (1 - 3 * NOISE), choice.reason
        before = now
