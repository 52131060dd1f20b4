"""MoELayer, on the CPU with the PyTorch variants: values checked, chosen by the table, warmed, and run plainly."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from small_layers import CPU, EMPTY, SHAPE, TORCH_VARIANTS, batch, call, directly, make_layer, measured, recorded_run

from workbench import checks, registry, select
from workbench import layer as layers
from workbench import table as tables
from workbench.errors import InputError, UnknownVariantError
from workbench.generate import make_weights
from workbench.problem import INPUT_KINDS, InputKind, MoEInputs, MoEWeights
from workbench.variant import Config

FP8 = batch(SHAPE, input_kind="fp8")


@pytest.fixture(autouse=True)
def _nothing_recorded_or_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    select._log_miss.cache_clear()


@pytest.fixture
def weights() -> MoEWeights:
    return make_weights(SHAPE, seed=0, device=CPU)


def test_an_unknown_variant(weights: MoEWeights) -> None:
    with pytest.raises(UnknownVariantError, match=r"^variant: expected one of .*torch\.loop.*, got 'torch\.lop'"):
        make_layer(weights, variant="torch.lop")


def test_wrong_scales_are_refused_when_the_layer_is_made(weights: MoEWeights) -> None:
    weights.w13_scale[7, 1, 0] = torch.nan
    with pytest.raises(InputError, match=r"^w13_scale: expected finite values, got nan at \[7, 1, 0\]$"):
        make_layer(weights)


def test_values_are_read_on_the_first_call(weights: MoEWeights) -> None:
    inputs = batch(SHAPE)
    wrong = dataclasses.replace(inputs, topk_ids=inputs.topk_ids.clone().fill_(8))
    layer = make_layer(weights)
    for _ in range(2):  # a refused call does not count as the first
        with pytest.raises(InputError, match=r"^topk_ids: expected ids in -1..7, got 8 at \[0, 0\]$"):
            call(layer, wrong)
    call(layer, inputs)
    layer._plans[5, False] = dataclasses.replace(layer._plans[5, False], variant=recorded_run())
    layer._passed.clear()
    call(layer, wrong)

    quantised = batch(SHAPE, input_kind="fp8")
    assert quantised.x_scale is not None
    quantised.x_scale[2, 1] = math.inf
    with pytest.raises(InputError, match=r"^x_scale: expected finite values, got inf at \[2, 1\]$"):
        call(layer, quantised)


def test_values_are_read_on_every_call_if_the_environment_says_so(
    weights: MoEWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_CHECK_VALUES", "1")
    layer, inputs = make_layer(weights), batch(SHAPE)
    for _ in range(2):
        call(layer, inputs)
        with pytest.raises(InputError, match=r"^topk_ids: expected ids in -1..7, got -2 at \[0, 0\]$"):
            call(layer, dataclasses.replace(inputs, topk_ids=torch.full_like(inputs.topk_ids, -2)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_an_error_also_after_a_right_call(weights: MoEWeights) -> None:
    layer, right = make_layer(weights), {"out": torch.empty(5, 256, dtype=torch.bfloat16)}
    right |= {"x": FP8.tokens, "x_scale": FP8.x_scale, "topk_weights": FP8.topk_weights, "topk_ids": FP8.topk_ids}
    layer(**right)
    nested = torch.nested.nested_tensor([torch.rand(5, 2)])
    for name in right:
        with pytest.raises(RuntimeError, match="NestedTensorImpl"):
            layer(**right | {name: nested})


def test_a_call_like_one_that_passed_is_not_checked_again(weights: MoEWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, check = [], checks.batch
    monkeypatch.setattr(checks, "batch", lambda *given: checked.append(given[2].shape[0]) or check(*given))
    monkeypatch.setattr(layers, "MAX_PASSED", 2)
    layer = make_layer(weights)
    few, more, most = (batch(SHAPE, num_tokens) for num_tokens in (3, 5, 7))
    for inputs in (few, few, more, few, more, most, most, few, most):
        call(layer, inputs, routed_scaling_factor=1)
    assert checked == [3, 5, 7, 3]


def test_the_table_decides(weights: MoEWeights) -> None:
    inputs = batch(SHAPE)
    for fast, slow in (TORCH_VARIANTS, TORCH_VARIANTS[::-1]):
        layer = make_layer(weights, variant="auto", table=measured((fast, 10.0), (slow, 20.0)))
        assert layer.choice(5) == (fast, Config())
        assert torch.equal(call(layer, inputs), directly(fast, weights, inputs))


def test_the_choice_is_made_once_for_each_m(weights: MoEWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, choose = [], select.choose
    monkeypatch.setattr(select, "choose", lambda *given: asked.append(given[1:3]) or choose(*given))
    layer = make_layer(weights, variant="auto", table=EMPTY)
    for num_tokens in (5, 3, 5, 3, 0):
        call(layer, batch(SHAPE, num_tokens))
    assert [num_tokens for _, num_tokens in asked] == [5, 3]


def test_a_miss_is_said_once_with_the_command_that_fills_it(
    weights: MoEWeights, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        layer = make_layer(weights, variant="auto")
        for num_tokens in (3, 5):
            call(layer, batch(SHAPE, num_tokens))
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "using torch.grouped" in said
    assert "workbench tune --E 8 --N 256 --K 256 --top-k 2 --no-shared-expert" in said


def test_a_recorded_table_is_used(weights: MoEWeights, tmp_path: Path) -> None:
    tables.save(measured(("torch.loop", 10.0), ("torch.grouped", 20.0)), tmp_path / tables.SELECTION_FILE)
    assert make_layer(weights, variant="auto").choice(5) == ("torch.loop", Config())


def test_a_recorded_table_of_elsewhere_is_not_used(
    weights: MoEWeights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = dataclasses.replace(measured(("torch.loop", 10.0), ("torch.grouped", 20.0)))
    there = dataclasses.replace(there, environment=dataclasses.replace(recorded.HERE, device="another"))
    tables.save(there, tmp_path / tables.SELECTION_FILE)
    assert make_layer(weights, variant="auto").choice(5) == ("torch.grouped", Config())
    assert "selection table not used" in caplog.text
    assert "device 'another'" in caplog.text
    with pytest.raises(InputError, match=r"^table: expected one made in"):
        make_layer(weights, table=there)


def test_a_variant_asked_for_by_name_takes_its_best_recorded_config(
    weights: MoEWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = recorded.variant("torch.recorded", num_configs=3)
    monkeypatch.setitem(registry.variants(), variant.name, variant)  # type: ignore[arg-type]
    traces = [
        trace
        for config, median_us in enumerate((30.0, 20.0, 10.0))
        for trace in recorded.both(recorded.key(variant, config, 5), median_us)
    ]
    table = tables.build(traces, recorded.HERE, recorded.named(variant))
    assert make_layer(weights, variant=variant.name, table=table).choice(5) == (variant.name, Config(block_m=2))
    assert make_layer(weights, variant=variant.name, table=EMPTY).choice(5) == (variant.name, Config(block_m=0))


@pytest.mark.parametrize("input_kind", INPUT_KINDS)
def test_a_warmed_layer_makes_nothing_more(
    weights: MoEWeights, input_kind: InputKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, runs = registry.find("torch.grouped"), []
    run = type(variant).run
    monkeypatch.setattr(
        type(variant), "run", lambda self, *given: runs.append(given[1].num_tokens) or run(self, *given)
    )
    layer = make_layer(weights, variant="torch.grouped")
    layer.warm([5, 0, 3], quantised=input_kind == "fp8")
    assert runs == [5, 3]  # each M once, as its kernels are compiled on their first run
    assert list(layer.prepared) == ["torch.grouped"]
    monkeypatch.setattr(layer, "_make_plan", lambda *given: pytest.fail("a plan was made after warm"))
    for num_tokens in (3, 5):
        inputs = batch(SHAPE, num_tokens, input_kind)
        assert torch.equal(call(layer, inputs), directly("torch.grouped", weights, inputs))


def test_warm_leaves_the_values_of_the_first_call_to_be_read(weights: MoEWeights) -> None:
    layer = make_layer(weights)
    layer.warm([5])
    wrong = dataclasses.replace(batch(SHAPE), topk_ids=torch.full((5, 2), 8, dtype=torch.int32))
    with pytest.raises(InputError, match=r"^topk_ids: expected ids in -1..7, got 8 at \[0, 0\]$"):
        call(layer, wrong)


@pytest.mark.parametrize("num_tokens", [-1, 2.0, True, "8"])
def test_warm_takes_numbers_of_tokens(weights: MoEWeights, num_tokens: Any) -> None:
    with pytest.raises(InputError, match=r"^num_tokens: expected integers >= 0, got "):
        make_layer(weights).warm([num_tokens])


def test_excluded_variants_are_not_chosen(weights: MoEWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    table = measured(("torch.loop", 10.0), ("torch.grouped", 20.0))
    assert make_layer(weights, variant="auto", table=table).choice(5)[0] == "torch.loop"
    for some in ({"exclude": ["torch.loop"]}, {"exclude": ["torch.loop"], "table": EMPTY}):
        assert make_layer(weights, variant="auto", **{"table": table, **some}).choice(5)[0] == "torch.grouped"
    monkeypatch.setenv("MOE_WORKBENCH_EXCLUDE", "torch.loop, cuda.sm90_fused")
    assert make_layer(weights, variant="auto", table=table).choice(5)[0] == "torch.grouped"
    assert make_layer(weights, variant="torch.loop", table=table).choice(5)[0] == "torch.loop"


def test_a_layer_explains_what_it_runs(weights: MoEWeights) -> None:
    layer = make_layer(weights, variant="auto", table=measured(("torch.loop", 10.0), ("torch.grouped", 20.0)))
    choice = layer.explain(5)
    assert (choice.variant, choice.measured, choice.default and choice.default.variant) == (
        "torch.loop",
        True,
        "torch.grouped",
    )
    assert "2.00x the speed of the default torch.grouped" in choice.reason
    assert layer.measured_tokens() == (5,)
    assert layer.measured_tokens(quantised=True) == ()
    named = make_layer(weights, variant="torch.loop", table=EMPTY).explain(5)
    assert (named.variant, named.reason, named.measured) == ("torch.loop", "named, and not measured", False)


def test_a_variant_runs_without_autocast_and_gradients_whatever_ran_before(weights: MoEWeights) -> None:
    """Without gradients: they are off, or nothing that is given requires one."""
    layer, inputs, found = make_layer(weights), batch(SHAPE, input_kind="fp8"), []
    variant = recorded_run()

    def run(prepared: Any, given: MoEInputs, out: torch.Tensor, config: Config) -> None:
        needed = (given.tokens, given.topk_weights, given.x_scale)
        learns = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in needed)
        found.append((torch.is_autocast_enabled("cpu"), learns))

    variant.run = run
    call(layer, inputs)
    layer._plans[5, True] = dataclasses.replace(layer._plans[5, True], variant=variant)
    layer._passed.clear()
    assert inputs.x_scale is not None
    learning = [
        dataclasses.replace(inputs, topk_weights=inputs.topk_weights.clone().requires_grad_()),
        dataclasses.replace(inputs, x_scale=inputs.x_scale.clone().requires_grad_()),
    ]
    for _ in range(2):
        for given in (inputs, *learning):
            call(layer, given)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                call(layer, given)
            with torch.inference_mode():
                call(layer, given)
    assert found == [(False, False)] * 18
