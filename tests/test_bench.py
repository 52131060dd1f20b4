"""Bench times what is right, keeps kernel and layer apart, and has no figure for what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faulty_variants import Faulty

from workbench import environment
from workbench.bench import Contender, bench
from workbench.generate import make_inputs, make_weights
from workbench.problem import MoEInputs, MoEShape, Workload
from workbench.registry import find
from workbench.roofline import floor_us
from workbench.timing import Effort, backend_of
from workbench.trace import Environment, Scope, Status, Trace
from workbench.variant import Config
from workbench.verify import Case, make_case

SHAPE = MoEShape(num_experts=4, hidden_size=128, intermediate_size=128, top_k=2)
EFFORT = Effort(num_samples=6, calls_per_sample=3)
H200 = Environment("NVIDIA H200", "none", "none", "none", "none", "none")


def case_of(device: torch.device, num_tokens: int = 5) -> Case:
    workload = Workload(SHAPE, num_tokens, seed=7)
    return make_case(workload, make_weights(SHAPE, 7, device))


def benched(
    device: torch.device, *configs: Config, scope: Scope = "kernel", variant: Faulty | None = None, here: Any = None
) -> list[Trace]:
    case, variant = case_of(device), variant or Faulty()
    contenders = [Contender(variant, variant.prepare(case.weights), config) for config in configs]
    here = here or environment.current(device)
    return list(bench("bench", contenders, case, scope, here, backend_of(device), EFFORT))


@pytest.mark.parametrize("scope", ["kernel", "layer"])
def test_a_right_candidate_gets_a_time(device: torch.device, scope: Scope) -> None:
    (trace,) = benched(device, Config(), scope=scope)
    assert (trace.job, trace.status, trace.scope, trace.seed) == ("bench", Status.PASSED, scope, 7)
    assert trace.timing is not None
    assert trace.accuracy is not None
    assert 0 < trace.timing.low_us <= trace.timing.median_us <= trace.timing.high_us
    assert (trace.timing.num_samples, trace.timing.num_routings) == (6, 3)


def test_what_is_wrong_or_raises_has_no_time_and_does_not_stop_the_others(device: torch.device) -> None:
    faults = ("half", "NaN", "raises")
    traces = benched(device, *(Config(fault=fault) for fault in faults), Config(), Config(block_m=2))
    ended = {str(trace.key.config): (trace.status, trace.timing is not None) for trace in traces}
    assert ended == {
        "fault=half": (Status.WRONG, False),
        "fault=NaN": (Status.WRONG, False),
        "fault=raises": (Status.FAILED, False),
        "default": (Status.PASSED, True),
        "block_m=2": (Status.PASSED, True),
    }
    assert traces[0].message == "relative error 0.5, expected at most 0.01"
    assert traces[2].message == "ValueError: no tile of that size"


class Watched(Faulty):
    """Notes the batches it is run on."""

    def __init__(self) -> None:
        self.batches: list[MoEInputs] = []

    def run(self, prepared: Any, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        self.batches.append(inputs)
        super().run(prepared, inputs, out, config)


def test_the_kernel_runs_on_quantised_tokens_and_the_layer_on_what_the_caller_has(device: torch.device) -> None:
    for scope, quantised in (("kernel", True), ("layer", False)):
        watched = Watched()
        benched(device, Config(), scope=scope, variant=watched)  # type: ignore[arg-type]
        assert {batch.quantised for batch in watched.batches} == {quantised}


def test_every_call_of_a_sample_has_a_routing_of_its_own(device: torch.device) -> None:
    watched = Watched()
    benched(device, Config(), scope="layer", variant=watched)
    first, second, third = (batch.topk_weights for batch in watched.batches[:3])
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(third, make_inputs(Workload(SHAPE, 5, seed=7), device).topk_weights)


def test_the_floor_is_the_mean_over_the_routings_and_counts_bf16_tokens_for_the_layer_alone(
    device: torch.device,
) -> None:
    (kernel,) = benched(device, Config(), here=H200)
    (layer,) = benched(device, Config(), scope="layer", here=H200)
    batches = [make_inputs(Workload(SHAPE, 5, seed=seed), device) for seed in (7, 8, 9)]
    floors = [floor_us(SHAPE, batch.topk_ids, "fp8", "NVIDIA H200") or 0 for batch in batches]
    assert kernel.floor_us == pytest.approx(sum(floors) / 3)
    assert layer.floor_us == pytest.approx(sum(floors) / 3 + 5 * (128 - 4) / 4.6e6)
    (unknown,) = benched(device, Config(), here=Environment("some CPU", *["none"] * 5))
    assert unknown.floor_us is None


def test_the_parent_is_told_of_each_contender_and_then_of_the_race(device: torch.device) -> None:
    case, variant, told = case_of(device), Faulty(), []
    contenders = [Contender(variant, variant.prepare(case.weights), Config(block_m=m)) for m in (1, 2)]
    here = environment.current(device)
    list(bench("tune", contenders, case, "kernel", here, backend_of(device), EFFORT, announce=told.append))
    assert told == [*contenders, None]


def test_the_torch_variants_are_timed_together(device: torch.device) -> None:
    case = case_of(device, num_tokens=17)
    contenders = []
    for name in ("torch.loop", "torch.grouped"):
        variant = find(name)
        if variant.supports(SHAPE, device):
            contenders.append(Contender(variant, variant.prepare(case.weights), Config()))
    here = environment.current(device)
    traces = list(bench("bench", contenders, case, "layer", here, backend_of(device), EFFORT))
    assert [trace.status for trace in traces] == [Status.PASSED] * len(contenders)
    capturable = {contender.variant.name: contender.variant.graph_capturable for contender in contenders}
    for trace in traces:
        assert trace.timing is not None
        assert trace.timing.graph == (device.type == "cuda" and capturable[trace.key.variant])
