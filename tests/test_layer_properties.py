"""The properties have teeth: each of these faults, put into a correct variant, is caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import layer_properties as kit
import pytest
import torch

from kernels_torch.loop import TorchLoop
from workbench.problem import MoEInputs, MoEWeights
from workbench.variant import Config

Fault = Callable[[MoEWeights, MoEInputs, torch.Tensor], None]

LOOP = TorchLoop()


def correct(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    LOOP.run(weights, inputs, out, Config())


def writes_its_inputs(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    correct(weights, inputs, out)
    inputs.topk_weights.mul_(2)


def writes_its_weights(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    correct(weights, inputs, out)
    weights.w2_scale.neg_()


def leaves_a_row_of_out(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    held = out[:1].clone()
    correct(weights, inputs, out)
    out[:1] = held


def writes_behind_out(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    correct(weights, inputs, out)
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()


def adds_uninitialised_memory(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    correct(weights, inputs, out)
    out.add_(torch.empty_like(out))


def forgets_topk_weights(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    correct(weights, dataclasses.replace(inputs, topk_weights=torch.ones_like(inputs.topk_weights)), out)


def forgets_the_scaling_factor(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    correct(weights, dataclasses.replace(inputs, routed_scaling_factor=1.0), out)


def takes_a_missing_expert_for_expert_0(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    correct(weights, dataclasses.replace(inputs, topk_ids=inputs.topk_ids.clamp(min=0)), out)


def swaps_gate_and_up(weights: MoEWeights, inputs: MoEInputs, out: torch.Tensor) -> None:
    w13, w13_scale = (torch.cat(t.chunk(2, dim=1)[::-1], dim=1) for t in (weights.w13, weights.w13_scale))
    correct(dataclasses.replace(weights, w13=w13, w13_scale=w13_scale), inputs, out)


def faulty(fault: Fault) -> TorchLoop:
    class Faulty(TorchLoop):
        def run(self, prepared: MoEWeights, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
            fault(prepared, inputs, out)

    return Faulty()


@pytest.mark.parametrize(
    ("fault", "prop"),
    [
        (writes_its_inputs, kit.splitting_the_batch_changes_nothing),
        (writes_its_weights, kit.permuting_tokens_permutes_rows),
        (leaves_a_row_of_out, kit.matches_the_reference),
        (writes_behind_out, kit.matches_the_reference),
        (adds_uninitialised_memory, kit.linear_in_topk_weights),
        (forgets_topk_weights, kit.a_zero_weight_removes_an_expert),
        (forgets_topk_weights, kit.linear_in_topk_weights),
        (forgets_the_scaling_factor, kit.doubling_a_linear_factor_doubles_out),
        (takes_a_missing_expert_for_expert_0, kit.renaming_experts_changes_nothing),
        (takes_a_missing_expert_for_expert_0, kit.a_batch_without_experts_is_zero),
        (swaps_gate_and_up, kit.matches_the_reference),
    ],
    ids=lambda function: function.__name__,
)
def test_a_fault_is_caught(fault: Fault, prop: kit.Property) -> None:
    with pytest.raises(AssertionError):
        kit.check(prop, faulty(fault), kit.small_shapes(), max_examples=8)


class CallsItselfDeterministic(TorchLoop):
    """Off by a few last bits where the batch is even."""

    deterministic = True

    def run(self, prepared: MoEWeights, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        correct(prepared, inputs, out)
        if inputs.num_tokens % 2 == 0:
            out.mul_(1 + 2**-6)


def test_a_deterministic_variant_whose_rows_depend_on_the_batch_is_caught() -> None:
    with pytest.raises(AssertionError):
        kit.check(
            kit.splitting_the_batch_changes_nothing, CallsItselfDeterministic(), kit.small_shapes(), max_examples=8
        )


@pytest.mark.parametrize("prop", kit.PROPERTIES, ids=kit.name_of)
def test_the_correct_variant_they_were_put_into_passes(prop: kit.Property) -> None:
    kit.check(prop, faulty(correct), kit.small_shapes(), max_examples=3, bitwise=True)
