"""Whether a variant computes the layer: its output against the fp32 reference, and nothing else touched.

A kernel can be right by luck, so every run starts from the worst state: `out` and free memory hold NaN, `out` lies
between guard rows, and what an earlier run left behind is there for the next. Each variant runs on the caller's inputs,
on aligned ones, on the caller's again, and, where a CUDA graph can hold it, replayed on a batch that it was not
captured with. All must be right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from reference.moe import moe
from workbench.environment import sources_digest
from workbench.errors import one_line
from workbench.generate import make_inputs
from workbench.numerics import measure, passed, poison, poisoned_allocations
from workbench.problem import MoEInputs, MoEWeights, Workload
from workbench.trace import Accuracy, Environment, Key, Status, Trace, now
from workbench.variant import Config, Variant

GUARD_ROWS = 16

Run = Callable[[torch.Tensor], None]
"""Writes its argument, out bf16 [M, H]."""


@dataclass(frozen=True)
class Case:
    """A workload with its tensors and what must come out; shared by all variants that are held against it."""

    workload: Workload
    weights: MoEWeights
    weight_sums: tuple[torch.Tensor, ...]
    """The sum of the bytes of each row of each weight tensor, by which a write to them shows."""
    inputs: MoEInputs
    expected: torch.Tensor
    """fp32 [M, H]"""


def make_case(workload: Workload, weights: MoEWeights) -> Case:
    """The inputs of `workload` on the weights' device, and the reference's output for them."""
    inputs = make_inputs(workload, weights.device)
    return Case(workload, weights, _row_sums(weights), inputs, expected_output(weights, inputs))


def expected_output(weights: MoEWeights, inputs: MoEInputs) -> torch.Tensor:
    """What the reference says of a batch: fp32 [M, H]."""
    inputs, shape = inputs.quantise(), weights.shape
    assert inputs.x_q is not None and inputs.x_scale is not None
    return moe(
        inputs.x_q,
        inputs.x_scale,
        weights.w13,
        weights.w13_scale,
        weights.w2,
        weights.w2_scale,
        inputs.topk_weights,
        inputs.topk_ids,
        inputs.routed_scaling_factor,
        w13_bias=weights.w13_bias,
        w2_bias=weights.w2_bias,
        swiglu_limit=shape.swiglu_limit,
        swiglu_alpha=shape.swiglu_alpha,
        swiglu_beta=shape.swiglu_beta,
        activation_scales=shape.activation_scales,
    )


def key_of(variant: Variant, config: Config, workload: Workload, environment: Environment) -> Key:
    """The key of a measurement of `variant` as its sources are now."""
    return Key(
        variant=variant.name,
        config=config,
        sources=sources_digest(variant),
        shape=workload.shape,
        num_tokens=workload.num_tokens,
        routing=workload.routing.identity(),
        dropped=workload.dropped,
        input_kind=workload.input_kind,
        environment=environment,
    )


def verify_one(variant: Variant, prepared: Any, case: Case, config: Config, environment: Environment) -> Trace:
    """Run `variant` in every way that counts; PASSED, WRONG with what is wrong first, or FAILED when it raised.

    The accuracy recorded is the worst of the runs.
    """
    trace = Trace(
        job="verify",
        status=Status.FAILED,
        key=key_of(variant, config, case.workload, environment),
        seed=case.workload.seed,
        message="did not end",
        created=now(),
    )
    worst: Accuracy | None = None
    try:
        for name, run in _runs(variant, prepared, case, config):
            accuracy, complaint = _check(run, case, variant.tolerance)
            if worst is None or not accuracy.rel_err <= worst.rel_err:  # NaN is worse than any number
                worst = accuracy
            if complaint:
                message = f"{name}: {complaint}"
                return dataclasses.replace(trace, status=Status.WRONG, accuracy=accuracy, message=message)
    except Exception as error:
        return dataclasses.replace(trace, message=one_line(error))
    return dataclasses.replace(trace, status=Status.PASSED, accuracy=worst, message="")


def _runs(variant: Variant, prepared: Any, case: Case, config: Config) -> Iterator[tuple[str, Run]]:
    def direct(out: torch.Tensor) -> None:
        variant.run(prepared, case.inputs, out, config)

    def aligned(out: torch.Tensor) -> None:
        variant.run(prepared, variant.align(prepared, case.inputs.quantise(), config), out, config)

    def replayed(out: torch.Tensor) -> None:
        _replay_on_another_batch(variant, prepared, case, config, out)

    yield "first run", direct
    yield "run on aligned inputs", aligned
    yield "second run", direct
    if variant.graph_capturable and case.weights.device.type == "cuda":
        yield "replay of a CUDA graph", replayed


def _replay_on_another_batch(
    variant: Variant, prepared: Any, case: Case, config: Config, out: torch.Tensor
) -> None:  # fmt: skip
    """Capture `run` on another batch, put the case's inputs in its place, replay."""
    other = dataclasses.replace(case.workload, seed=case.workload.seed + 1)
    inputs = make_inputs(other, case.weights.device)
    variant.run(prepared, inputs, out, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        variant.run(prepared, inputs, out, config)
    for tensor, given in zip(_tensors(inputs), _tensors(case.inputs), strict=True):
        tensor.copy_(given)
    poison(out)
    graph.replay()
    torch.cuda.synchronize(case.weights.device)  # before the graph and its memory go


def _check(run: Run, case: Case, tolerance: float) -> tuple[Accuracy, str]:
    """The accuracy of one run from the worst state, and what is wrong with it, "" if nothing."""
    device = case.weights.device
    num_tokens, hidden_size = case.expected.shape
    rows = torch.empty(num_tokens + 2 * GUARD_ROWS, hidden_size, dtype=torch.bfloat16, device=device)
    poison(rows)
    out = rows[GUARD_ROWS : GUARD_ROWS + num_tokens]
    before = [tensor.clone() for tensor in _tensors(case.inputs)]
    with poisoned_allocations(device):
        run(out)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    accuracy = measure(out, case.expected, tolerance)
    for name, tensor, kept in zip(_names(case.inputs), _tensors(case.inputs), before, strict=True):
        if not torch.equal(_bytes(tensor), _bytes(kept)):
            return accuracy, f"inputs.{name} was written"
    if not all(torch.equal(after, kept) for after, kept in zip(_row_sums(case.weights), case.weight_sums, strict=True)):
        return accuracy, "the weights were written"
    if not all((_bytes(guard) == 0xFF).all() for guard in (rows[:GUARD_ROWS], rows[GUARD_ROWS + num_tokens :])):
        return accuracy, "memory beside out was written"
    if not passed(accuracy):
        return accuracy, f"relative error {accuracy.rel_err:.4g}, expected at most {accuracy.tolerance:g}"
    return accuracy, ""


def _names(inputs: MoEInputs) -> list[str]:
    names = ("x", "x_q", "x_scale", "topk_ids", "topk_weights")
    return [name for name in names if getattr(inputs, name) is not None]


def _tensors(inputs: MoEInputs) -> list[torch.Tensor]:
    return [getattr(inputs, name) for name in _names(inputs)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def _row_sums(weights: MoEWeights) -> tuple[torch.Tensor, ...]:
    return tuple(_bytes(tensor).sum(dim=-1, dtype=torch.int32) for tensor in weights.tensors)
