"""triton.grouped: the layer's properties, and every way through `run`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from layer_properties import PROPERTIES, Property, check, name_of, small_shapes

from kernels_triton.grouped import TritonGrouped
from kernels_triton.tuning_space import tuning_space
from reference.routing import align_block_size
from workbench.errors import CompileError
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure, poisoned_allocations
from workbench.problem import MoEInputs, MoEShape, MoEWeights, Workload
from workbench.variant import Config
from workbench.verify import expected_output

VARIANT = TritonGrouped()
SHAPE = MoEShape(num_experts=5, hidden_size=384, intermediate_size=256, top_k=3, num_shared_experts=1)
WEIGHTS = make_weights(SHAPE, 0, "cpu")
DEFAULT = tuning_space(SHAPE, 20)[0]

ROUNDING = 0.004
"""Keeping fp32 up to the quantisation leaves the rounding of each expert's output, and of the sum, to bf16."""


def batch(num_tokens: int = 20, **workload: object) -> MoEInputs:
    return make_inputs(Workload(SHAPE, num_tokens, dropped=0.2, **workload), "cpu")  # type: ignore[arg-type]


def run(inputs: MoEInputs, config: Config = DEFAULT, weights: MoEWeights = WEIGHTS) -> torch.Tensor:
    out = torch.full((inputs.num_tokens, weights.shape.hidden_size), torch.nan, dtype=torch.bfloat16)
    with poisoned_allocations(torch.device("cpu")):
        VARIANT.run(VARIANT.prepare(weights), inputs, out, config)
    return out.float()


def relative_error(out: torch.Tensor, inputs: MoEInputs, weights: MoEWeights = WEIGHTS) -> float:
    return measure(out, expected_output(weights, inputs), VARIANT.tolerance).rel_err


@pytest.mark.parametrize("prop", PROPERTIES, ids=name_of)
def test_layer_property(prop: Property) -> None:
    check(prop, VARIANT, small_shapes(), "cpu", max_examples=3, bitwise=True)


def one_of_each_kind() -> list[Config]:
    """A configuration for each block size, with SwiGLU fused and alone, and with K split and whole."""
    kinds = {}
    for num_tokens in (1, 20, 60, 400):
        for config in tuning_space(SHAPE, num_tokens):
            whole = config["split_k"] == 1
            kinds.setdefault((config["block_m"], config["fuse_swiglu"], whole, config["up_block_n"]), config)
    return list(kinds.values())


@pytest.mark.parametrize("config", one_of_each_kind(), ids=str)
def test_every_kind_of_configuration_matches_the_reference(config: Config) -> None:
    inputs = batch()
    assert relative_error(run(inputs, config), inputs) < ROUNDING


@pytest.mark.parametrize("swap", [True, False])
def test_swapped_operands_give_the_same(swap: bool) -> None:
    inputs = batch()
    config = Config(**{**DEFAULT, "swap": swap})
    torch.testing.assert_close(run(inputs, config), run(inputs), rtol=2**-6, atol=2e-3)


def test_k_may_be_shared_by_more_programs_than_it_has_blocks() -> None:
    shape = MoEShape(num_experts=3, hidden_size=256, intermediate_size=128, top_k=2)
    weights, inputs = make_weights(shape, 0, "cpu"), make_inputs(Workload(shape, 5), "cpu")
    config = Config(**{**tuning_space(shape, 1)[0], "split_k": 5})
    assert relative_error(run(inputs, config, weights), inputs, weights) < ROUNDING


def test_routing_aligned_to_another_block_size_is_aligned_again() -> None:
    inputs = batch()
    other = dataclasses.replace(inputs, aligned=align_block_size(inputs.topk_ids, 64, SHAPE.num_experts))
    assert torch.equal(run(other), run(inputs))


def test_routing_aligned_by_the_reference_serves() -> None:
    inputs = batch()
    aligned = align_block_size(inputs.topk_ids, DEFAULT.integer("block_m"), SHAPE.num_experts)
    assert torch.equal(run(dataclasses.replace(inputs, aligned=aligned)), run(inputs))


def test_align_quantises_and_keeps_the_batch() -> None:
    inputs = batch()
    aligned = VARIANT.align(WEIGHTS, inputs, DEFAULT)
    assert aligned.quantised
    assert aligned.x is None
    assert aligned.aligned is not None
    assert aligned.aligned.block_size == DEFAULT["block_m"]
    assert torch.equal(run(aligned), run(inputs))


def test_no_tokens_are_no_work() -> None:
    assert run(batch(num_tokens=0)).shape == (0, SHAPE.hidden_size)
    aligned = VARIANT.align(WEIGHTS, batch(num_tokens=0), DEFAULT)
    assert run(aligned).shape == (0, SHAPE.hidden_size)


def test_nothing_compiles_where_kernels_are_interpreted() -> None:
    with pytest.raises(CompileError, match="expected a process without TRITON_INTERPRET=1"):
        VARIANT.compile(SHAPE, [DEFAULT])


def test_supports_the_cpu_here() -> None:
    assert VARIANT.supports(SHAPE, torch.device("cpu"))
