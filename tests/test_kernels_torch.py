"""torch.loop and torch.grouped: the layer's properties, and what they support."""

from __future__ import annotations

import pytest
import torch
from layer_properties import PROPERTIES, Property, check, layer_forms, name_of, small_shapes

from kernels_torch.grouped import TorchGrouped
from kernels_torch.loop import TorchLoop
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure
from workbench.problem import MoEShape, Workload
from workbench.variant import Config, Variant
from workbench.verify import expected_output

VARIANTS = [TorchLoop(), TorchGrouped()]
CPU = torch.device("cpu")


@pytest.mark.parametrize("prop", PROPERTIES, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_layer_property(variant: Variant, prop: Property) -> None:
    check(prop, variant, small_shapes(), CPU, max_examples=15, bitwise=True)


@pytest.mark.parametrize("prop", PROPERTIES, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_layer_property_where_128_does_not_divide_the_sizes(variant: Variant, prop: Property) -> None:
    check(prop, variant, small_shapes(hidden_multiple=72, intermediate_multiple=88), CPU, max_examples=6, bitwise=True)


@pytest.mark.parametrize("prop", PROPERTIES, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_layer_property_in_every_form(variant: Variant, prop: Property) -> None:
    shapes = small_shapes(hidden_multiple=64, intermediate_multiple=88, forms=layer_forms())
    check(prop, variant, shapes, CPU, max_examples=15, bitwise=True)


@pytest.mark.parametrize("intermediate_size", [176, 192, 320, 704])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_shares_of_i_that_128_does_not_divide(variant: Variant, intermediate_size: int) -> None:
    shape = MoEShape(3, 256, intermediate_size, 2)
    weights, inputs = make_weights(shape, 0, CPU), make_inputs(Workload(shape, 5), CPU)
    out = torch.empty(5, 256, dtype=torch.bfloat16)
    variant.run(variant.prepare(weights), inputs, out, Config())
    assert measure(out, expected_output(weights, inputs), variant.tolerance).rel_err <= variant.tolerance


def test_grouped_refuses_rows_that_are_no_multiple_of_16_bytes() -> None:
    support = TorchGrouped().supports(MoEShape(4, 256, 100, 2), CPU)
    assert not support
    assert support.reason == "grouped_mm needs I to be a multiple of 8, got 100"
    assert TorchLoop().supports(MoEShape(4, 256, 100, 2), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_grouped_refuses_a_gpu_that_is_not_there() -> None:
    assert TorchGrouped().supports(MoEShape(4, 256, 128, 2), torch.device("cuda")).reason == (
        "needs a CPU or a CUDA device, got cuda"
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_one_configuration_and_sources_that_exist(variant: Variant) -> None:
    assert list(variant.configs(MoEShape(4, 256, 128, 2), 7)) == [Config()]
    assert all(path.is_file() for path in variant.sources())
