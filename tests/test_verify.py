"""What verify must find, each by a variant that does just that wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from faulty_variants import Faulty

from kernels_torch.loop import TorchLoop
from workbench import environment
from workbench.generate import make_weights
from workbench.problem import MoEShape, RoutingLaw, Workload
from workbench.registry import find
from workbench.trace import Status, Trace
from workbench.variant import Config, Variant
from workbench.verify import Case, key_of, make_case, verify_one

SHAPE = MoEShape(num_experts=4, hidden_size=128, intermediate_size=128, top_k=2)


def case_of(device: torch.device, workload: Workload) -> Case:
    return make_case(workload, make_weights(workload.shape, workload.seed, device))


def verified(device: torch.device, fault: str, workload: Workload | None = None) -> Trace:
    case = case_of(device, workload or Workload(SHAPE, num_tokens=5, seed=7))
    variant = Faulty()
    config = Config(fault=fault) if fault else Config()
    return verify_one(variant, variant.prepare(case.weights), case, config, environment.current(device))


@pytest.mark.parametrize("input_kind", ["bf16", "fp8"])
def test_a_right_variant_passes_with_its_accuracy(device: torch.device, input_kind: str) -> None:
    workload = Workload(SHAPE, num_tokens=5, seed=7, input_kind=input_kind)  # type: ignore[arg-type]
    trace = verified(device, "", workload)
    assert (trace.job, trace.status, trace.message, trace.seed) == ("verify", Status.PASSED, "", 7)
    assert trace.accuracy is not None
    assert 0 < trace.accuracy.rel_err < 0.003, "the rounding of out to bf16 and no more"
    assert trace.accuracy.tolerance == Faulty.tolerance
    assert trace.key == key_of(Faulty(), Config(), workload, environment.current(device))


def test_an_empty_batch_passes(device: torch.device) -> None:
    assert verified(device, "", Workload(SHAPE, num_tokens=0)).status is Status.PASSED


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half", "first run: relative error 0.5, expected at most 0.01"),
        ("NaN", "first run: relative error nan, expected at most 0.01"),
        ("last row left out", "first run: relative error nan, expected at most 0.01"),
        ("wrong when aligned", "run on aligned inputs: relative error 1, expected at most 0.01"),
        ("right once", "run on aligned inputs: relative error 0.5, expected at most 0.01"),
        ("writes inputs", "first run: inputs.topk_weights was written"),
        ("writes weights", "first run: the weights were written"),
        ("writes before out", "first run: memory beside out was written"),
        ("writes behind out", "first run: memory beside out was written"),
    ],
)
def test_what_is_wrong_is_found_and_named(device: torch.device, fault: str, message: str) -> None:
    trace = verified(device, fault)
    assert (trace.status, trace.message) == (Status.WRONG, message)
    assert trace.accuracy is not None
    assert math.isnan(trace.accuracy.rel_err) == ("nan" in message)


def test_an_exception_is_told_in_one_line(device: torch.device) -> None:
    trace = verified(device, "raises")
    assert (trace.status, trace.message) == (Status.FAILED, "ValueError: no tile of that size")


@pytest.mark.parametrize("name", ["torch.loop", "torch.grouped"])
@pytest.mark.parametrize("routing", [RoutingLaw(), RoutingLaw("zipf", 1.2), RoutingLaw("one-expert")], ids=str)
def test_the_torch_variants_pass(device: torch.device, name: str, routing: RoutingLaw) -> None:
    shape = MoEShape(num_experts=8, hidden_size=256, intermediate_size=128, top_k=3, num_shared_experts=1)
    case = case_of(device, Workload(shape, num_tokens=33, routing=routing, dropped=0.2))
    variant = find(name)
    if not variant.supports(shape, device):
        pytest.skip(variant.supports(shape, device).reason)
    trace = verify_one(variant, variant.prepare(case.weights), case, Config(), environment.current(device))
    assert (trace.status, trace.message) == (Status.PASSED, "")


@pytest.mark.parametrize(
    "form",
    [
        {"swiglu_limit": 10.0},
        {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
        {"activation_scales": "group_ue8m0"},
        {"weight_scales": "channel", "activation_scales": "token"},
        {"has_bias": True},
    ],
    ids=str,
)
def test_a_variant_that_computes_the_plain_layer_in_place_of_another_form_is_wrong(
    device: torch.device, form: dict[str, Any]
) -> None:
    class Plain(TorchLoop):
        """Takes every layer for the plain one; with the tolerance that most variants have."""

        tolerance = Variant.tolerance

        def run(self, prepared, inputs, out, config):  # type: ignore[no-untyped-def]
            weights = dataclasses.replace(prepared, shape=SHAPE, w13_bias=None, w2_bias=None)
            super().run(weights, dataclasses.replace(inputs, activation_scales="group"), out, config)

    shape = MoEShape(num_experts=4, hidden_size=512, intermediate_size=384, top_k=2, **form)
    case = case_of(device, Workload(shape, num_tokens=9))
    right, wrong = TorchLoop(), Plain()
    assert verify_one(right, case.weights, case, Config(), environment.current(device)).status is Status.PASSED
    trace = verify_one(wrong, case.weights, case, Config(), environment.current(device))
    assert trace.status is Status.WRONG
    assert trace.message.startswith("first run: relative error")


@pytest.mark.gpu
def test_a_graph_that_remembers_the_batch_it_was_captured_with_is_wrong(device: torch.device) -> None:
    class Remembering(Faulty):
        """Copies its tokens' routing through the host, so that a replay computes on the captured batch's."""

        graph_capturable = True

        def run(self, prepared, inputs, out, config):  # type: ignore[no-untyped-def]
            key = inputs.topk_ids.data_ptr()
            if key not in self.kept:
                super().run(prepared, inputs, out, config)
                self.kept[key] = out.clone()
            out.copy_(self.kept[key])

        kept: dict[int, torch.Tensor] = {}  # noqa: RUF012

    case = case_of(device, Workload(SHAPE, num_tokens=5))
    variant = Remembering()
    trace = verify_one(variant, variant.prepare(case.weights), case, Config(), environment.current(device))
    assert trace.status is Status.WRONG
    assert trace.message.startswith("replay of a CUDA graph: relative error")
