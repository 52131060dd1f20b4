"""The public call, on the CPU with the PyTorch variants: right, checked, prepared once, chosen, traceable."""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch

import workbench
from workbench import MoELayer, checks, ops, registry, select
from workbench import layer as layers
from workbench import table as tables
from workbench.errors import InputError, UnknownVariantError, UnsupportedError
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure, passed
from workbench.problem import INPUT_KINDS, InputKind, MoEInputs, MoEShape, MoEWeights, Workload
from workbench.table import Table
from workbench.variant import Config
from workbench.verify import expected_output

CPU = torch.device("cpu")
SHAPE = MoEShape(8, 256, 128, 2)
SHARED = MoEShape(9, 256, 192, 3, num_shared_experts=1)
EMPTY = Table(recorded.HERE, (), {})
TORCH_VARIANTS = ("torch.loop", "torch.grouped")


@pytest.fixture(autouse=True)
def _nothing_recorded_or_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    select._log_miss.cache_clear()
    yield
    ops.forget_layers()


def tensors(weights: MoEWeights) -> tuple[torch.Tensor, ...]:
    return weights.w13, weights.w13_scale, weights.w2, weights.w2_scale


def make_layer(weights: MoEWeights, **options: Any) -> MoELayer:
    shape = weights.shape
    defaults = {"top_k": shape.top_k, "num_shared_experts": shape.num_shared_experts, "variant": "torch.loop"}
    return MoELayer(*tensors(weights), **{**defaults, **options})


def call(layer: MoELayer, inputs: MoEInputs, **options: Any) -> torch.Tensor:
    factor = inputs.routed_scaling_factor
    return layer(
        inputs.tokens,
        inputs.topk_weights,
        inputs.topk_ids,
        **{"x_scale": inputs.x_scale, "routed_scaling_factor": factor, **options},
    )


def call_on_tensors(weights: MoEWeights, inputs: MoEInputs, **options: Any) -> torch.Tensor:
    return ops.fused_moe(
        inputs.tokens, *tensors(weights), inputs.topk_weights, inputs.topk_ids, **{"x_scale": inputs.x_scale, **options}
    )


def directly(name: str, weights: MoEWeights, inputs: MoEInputs, config: Config | None = None) -> torch.Tensor:
    """The variant's own run, around the public call."""
    variant = registry.find(name)
    out = torch.empty(inputs.num_tokens, weights.shape.hidden_size, dtype=torch.bfloat16)
    variant.run(variant.prepare(weights), inputs, out, config or Config())
    return out


def batch(shape: MoEShape, num_tokens: int = 5, input_kind: InputKind = "bf16", dropped: float = 0.0) -> MoEInputs:
    return make_inputs(Workload(shape, num_tokens, input_kind=input_kind, dropped=dropped), CPU)


BF16, FP8 = batch(SHAPE), batch(SHAPE, input_kind="fp8")


@pytest.fixture
def weights() -> MoEWeights:
    return make_weights(SHAPE, seed=0, device=CPU)


@pytest.mark.parametrize("dropped", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("input_kind", INPUT_KINDS)
@pytest.mark.parametrize("shape", [SHAPE, SHARED], ids=str)
@pytest.mark.parametrize("name", TORCH_VARIANTS)
def test_is_the_layer(name: str, shape: MoEShape, input_kind: InputKind, dropped: float) -> None:
    weights = make_weights(shape, seed=0, device=CPU)
    inputs = dataclasses.replace(batch(shape, 17, input_kind, dropped), routed_scaling_factor=2.5)
    reference = expected_output(weights, inputs)
    shared = shape.num_shared_experts
    for out in (
        call(make_layer(weights, variant=name), inputs),
        call_on_tensors(weights, inputs, variant=name, routed_scaling_factor=2.5, num_shared_experts=shared),
    ):
        assert out.dtype is torch.bfloat16
        assert passed(measure(out, reference, registry.find(name).tolerance))
        assert torch.equal(out, directly(name, weights, inputs))


@pytest.mark.parametrize("input_kind", INPUT_KINDS)
def test_no_tokens_give_no_rows(weights: MoEWeights, input_kind: InputKind) -> None:
    out = call_on_tensors(weights, batch(SHAPE, 0, input_kind))
    assert (out.shape, out.dtype) == ((0, 256), torch.bfloat16)


def test_out_is_written_and_returned(weights: MoEWeights) -> None:
    inputs, out = batch(SHAPE), torch.full((5, 256), torch.nan, dtype=torch.bfloat16)
    assert call(make_layer(weights), inputs, out=out) is out
    assert torch.equal(out, directly("torch.loop", weights, inputs))
    other = torch.full_like(out, torch.nan)
    assert call_on_tensors(weights, inputs, out=other, variant="torch.loop") is other
    assert torch.equal(other, out)


def test_importing_the_workbench_imports_no_kernels() -> None:
    program = "import sys, workbench; assert 'torch' not in sys.modules; workbench.fused_moe, workbench.MoELayer\n"
    program += "assert not [name for name in sys.modules if name.startswith('kernels_')]"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(ops.__file__).parents[1])
    assert workbench.fused_moe is ops.fused_moe


def test_an_unknown_variant(weights: MoEWeights) -> None:
    with pytest.raises(UnknownVariantError, match=r"^variant: expected one of .*torch\.loop.*, got 'torch\.lop'"):
        make_layer(weights, variant="torch.lop")


def test_a_cpu_tensor_given_to_a_gpu_variant(weights: MoEWeights) -> None:
    name = "triton.grouped"
    reason = registry.find(name).supports(SHAPE, CPU).reason
    with pytest.raises(UnsupportedError) as refused:
        call_on_tensors(weights, batch(SHAPE), variant=name)
    assert str(refused.value) == f"{name}: does not run E8_N256_K256_top2_shared0 on cpu: {reason}"


def test_arguments_that_are_no_tensors(weights: MoEWeights) -> None:
    inputs = batch(SHAPE)
    with pytest.raises(InputError, match=r"^topk_ids: expected int32 \[M, top_k\], got list$"):
        ops.fused_moe(inputs.tokens, *tensors(weights), inputs.topk_weights, [[0, 1]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^w13_scale: expected a tensor, got None$"):
        ops.fused_moe(
            inputs.tokens, weights.w13, None, weights.w2, weights.w2_scale, inputs.topk_weights, inputs.topk_ids
        )  # type: ignore[arg-type]


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


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "fused_moe"])
@pytest.mark.parametrize(
    ("good", "changed", "message"),
    [
        (BF16, {"x": BF16.tokens.half()}, "x: expected bfloat16 [5, 256], got float16 [5, 256]"),
        (BF16, {"x": BF16.tokens[:, :128]}, "x: expected bfloat16 [5, 256], got bfloat16 [5, 128]"),
        (BF16, {"x": BF16.tokens[0]}, "x: expected [M, 256], got bfloat16 [256]"),
        (BF16, {"x": None}, "x: expected [M, 256], got None"),
        (BF16, {"x": BF16.tokens.T.contiguous().T}, "x: expected a contiguous tensor [5, 256], got strides [1, 5]"),
        (BF16, {"x": BF16.tokens.to("meta")}, "x: expected a tensor on cpu, where w13 is, got one on meta"),
        (BF16, {"x": FP8.tokens}, "x_scale: expected float32 [5, 2] with quantised x, got None"),
        (BF16, {"x": BF16.tokens[:4]}, "topk_weights: expected float32 [4, 2], got float32 [5, 2]"),
        (BF16, {"x_scale": FP8.x_scale}, "x: expected float8_e4m3fn [5, 256], got bfloat16 [5, 256]"),
        (FP8, {"x_scale": None}, "x_scale: expected float32 [5, 2] with quantised x, got None"),
        (FP8, {"x_scale": [1.0]}, "x_scale: expected float32 [5, 2], got list"),
        (
            FP8,
            {"x_scale": torch.rand(2, 5).T},
            "x_scale: expected a contiguous tensor [5, 2], got strides [1, 5]",
        ),
        (BF16, {"topk_weights": None}, "topk_weights: expected float32 [5, 2], got None"),
        (
            BF16,
            {"topk_weights": BF16.topk_weights.double()},
            "topk_weights: expected float32 [5, 2], got float64 [5, 2]",
        ),
        (BF16, {"topk_weights": BF16.topk_weights[:4]}, "topk_weights: expected float32 [5, 2], got float32 [4, 2]"),
        (BF16, {"topk_ids": BF16.topk_ids.long()}, "topk_ids: expected int32 [5, 2], got int64 [5, 2]"),
        (
            BF16,
            {"topk_ids": BF16.topk_ids.T.contiguous().T},
            "topk_ids: expected a contiguous tensor [5, 2], got strides [1, 5]",
        ),
        (BF16, {"out": [0.0]}, "out: expected bfloat16 [5, 256], got list"),
        (BF16, {"out": torch.empty(5, 256)}, "out: expected bfloat16 [5, 256], got float32 [5, 256]"),
        (BF16, {"out": BF16.tokens[:4].clone()}, "out: expected bfloat16 [5, 256], got bfloat16 [4, 256]"),
        (BF16, {"out": BF16.tokens}, "out: expected memory of its own, got that of x"),
        (BF16, {"out": BF16.tokens.view(5, 256)}, "out: expected memory of its own, got that of x"),
        (BF16, {"routed_scaling_factor": math.inf}, "routed_scaling_factor: expected a finite number, got inf"),
        (BF16, {"routed_scaling_factor": "1"}, "routed_scaling_factor: expected a finite number, got '1'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_call_after_right_ones_is_refused_as_a_first_one(
    weights: MoEWeights, good: MoEInputs, changed: dict[str, Any], message: str, whole: bool
) -> None:
    out = torch.empty(5, 256, dtype=torch.bfloat16)
    right = {"x": good.tokens, "topk_weights": good.topk_weights, "topk_ids": good.topk_ids, "x_scale": good.x_scale}
    given = dict(zip(("w13", "w13_scale", "w2", "w2_scale"), tensors(weights), strict=True))
    layer = make_layer(weights)

    def called(arguments: dict[str, Any]) -> torch.Tensor:
        return ops.fused_moe(**given, **arguments, variant="torch.loop") if whole else layer(**arguments)

    for _ in range(2):
        for arguments in (right, right | {"out": out}):
            assert torch.equal(called(arguments), directly("torch.loop", weights, good))
            with pytest.raises(InputError) as refused:
                called(arguments | changed)
            assert str(refused.value) == message


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


def test_a_layer_that_is_made_again_remembers_nothing(weights: MoEWeights) -> None:
    wrong = dataclasses.replace(BF16, topk_ids=torch.full_like(BF16.topk_ids, 8))
    call_on_tensors(weights, BF16, variant="torch.loop")
    ops.forget_layers()
    with pytest.raises(InputError, match=r"^topk_ids: expected ids in -1..7, got 8 at \[0, 0\]$"):
        call_on_tensors(weights, wrong, variant="torch.loop")


def recorded_run() -> Any:
    """A variant whose run does nothing, for what must not reach a kernel."""
    variant: Any = recorded.variant("torch.nothing")
    variant.run = lambda *arguments: None
    return variant


def test_weights_are_prepared_once(weights: MoEWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, prepared = registry.find("torch.grouped"), []
    prepare = type(variant).prepare
    monkeypatch.setattr(type(variant), "prepare", lambda self, given: prepared.append(given) or prepare(self, given))
    for num_tokens in (5, 5, 3):
        for input_kind in INPUT_KINDS:
            call_on_tensors(weights, batch(SHAPE, num_tokens, input_kind), variant="torch.grouped")
    assert len(prepared) == 1
    parts = [part.expand(1, *part.shape) for part in tensors(weights)]
    for _ in range(2):  # a stacked tensor's view is made anew each time
        ops.fused_moe(
            batch(SHAPE).tokens,
            *(part[0] for part in parts),
            batch(SHAPE).topk_weights,
            batch(SHAPE).topk_ids,
            variant="torch.grouped",
        )
    assert len(prepared) == 1
    ops.forget_layers()
    call_on_tensors(weights, batch(SHAPE), variant="torch.grouped")
    assert len(prepared) == 2


@pytest.mark.parametrize("name", TORCH_VARIANTS)
def test_freed_weights_are_released(name: str) -> None:
    weights = make_weights(SHAPE, seed=0, device=CPU)
    call_on_tensors(weights, batch(SHAPE), variant=name)
    (kept,) = ops._kept.values()
    layer = weakref.ref(kept.layer)
    del kept
    assert layer() is not None
    del weights
    gc.collect()
    assert layer() is None
    assert not ops._kept


def test_the_least_recently_used_layer_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MAX_LAYERS", 2)
    some = [make_weights(SHAPE, seed, CPU) for seed in range(3)]
    for index in (0, 1, 0, 2):
        call_on_tensors(some[index], batch(SHAPE), variant="torch.loop")
    kept = {entry.layer.weights.w13.data_ptr() for entry in ops._kept.values()}
    assert kept == {some[0].w13.data_ptr(), some[2].w13.data_ptr()}


def test_the_same_objects_with_other_contents_are_another_layer(weights: MoEWeights) -> None:
    inputs, other = batch(SHAPE), make_weights(SHAPE, seed=1, device=CPU)
    given = tuple(tensor.clone() for tensor in tensors(weights))
    first = ops.fused_moe(inputs.tokens, *given, inputs.topk_weights, inputs.topk_ids, variant="torch.loop")
    assert torch.equal(first, directly("torch.loop", weights, inputs))
    for tensor, new in zip(given, tensors(other), strict=True):
        tensor.data = new  # as an engine does that loads weights again
    second = ops.fused_moe(inputs.tokens, *given, inputs.topk_weights, inputs.topk_ids, variant="torch.loop")
    assert torch.equal(second, directly("torch.loop", other, inputs))
    given[0].data = given[0].data.view(4, 512, 256)
    with pytest.raises(InputError, match=r"^w13_scale: expected float32 \[4, 4, 2\], got float32 \[8, 2, 2\]$"):
        ops.fused_moe(inputs.tokens, *given, inputs.topk_weights, inputs.topk_ids, variant="torch.loop")


def test_weights_moved_or_laid_out_anew_in_place_are_another_layer(weights: MoEWeights) -> None:
    inputs, other = batch(SHAPE), make_weights(SHAPE, seed=1, device=CPU)
    given = tuple(tensor.clone() for tensor in tensors(weights))
    for now in (weights, other):
        for tensor, new in zip(given, tensors(now), strict=True):
            tensor.set_(new.clone())
        for _ in range(2):
            out = ops.fused_moe(inputs.tokens, *given, inputs.topk_weights, inputs.topk_ids, variant="torch.loop")
            assert torch.equal(out, directly("torch.loop", now, inputs))
    given[0].transpose_(1, 2)  # square: the same address and shape
    with pytest.raises(InputError, match=r"^w13: expected a contiguous tensor \[8, 256, 256\], got strides"):
        ops.fused_moe(inputs.tokens, *given, inputs.topk_weights, inputs.topk_ids, variant="torch.loop")


def test_calls_are_told_apart_by_all_that_makes_a_layer(weights: MoEWeights) -> None:
    inputs = batch(SHAPE)
    for _ in range(2):
        plain = call_on_tensors(weights, inputs, variant="torch.loop")
        clamped = call_on_tensors(weights, inputs, variant="torch.loop", swiglu_limit=0.5)
        other = call_on_tensors(weights, inputs, variant="torch.grouped")
        assert torch.equal(plain, directly("torch.loop", weights, inputs))
        assert not torch.equal(clamped, plain)
        assert torch.equal(other, directly("torch.grouped", weights, inputs))
    assert len(ops._kept) == len(ops._calls) == 3
    with pytest.raises(TypeError, match=r"^fused_moe: expected keywords of .*, got swiglu_limits$"):
        call_on_tensors(weights, inputs, variant="torch.loop", swiglu_limits=0.5)


def test_nothing_is_kept_of_views_that_were_made_for_a_call(weights: MoEWeights) -> None:
    inputs = batch(SHAPE)
    for _ in range(3):
        views = tuple(tensor.view(tensor.shape) for tensor in tensors(weights))
        ops.fused_moe(inputs.tokens, *views, inputs.topk_weights, inputs.topk_ids, variant="torch.loop")
        assert len(ops._calls) == 1
        del views
        assert not ops._calls
    (kept,) = ops._kept.values()
    assert not kept.calls


def measured(*figures: tuple[str, float], num_tokens: int = 5, input_kind: InputKind = "bf16") -> Table:
    """A table in which each variant's layer takes so many microseconds."""
    variants = registry.variants()
    traces = [
        trace
        for name, median_us in figures
        for trace in recorded.both(
            recorded.key(
                variants[name],
                Config(),
                num_tokens,
                shape=SHAPE,
                input_kind=input_kind,
                sources=tables.sources_digest(variants[name]),
            ),
            median_us,
        )
    ]
    return tables.build(traces, recorded.HERE, variants)


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


def test_autocast_and_gradients_change_nothing(weights: MoEWeights) -> None:
    inputs = batch(SHAPE)
    reference = directly("torch.loop", weights, inputs)
    layer = make_layer(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(layer, inputs), reference)
    learning = dataclasses.replace(inputs, topk_weights=inputs.topk_weights.clone().requires_grad_())
    out = call(layer, learning)
    assert torch.equal(out, reference)
    assert not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(call_on_tensors(weights, inputs, variant="torch.loop"), reference)
    assert torch.equal(call_on_tensors(weights, inputs, variant="torch.loop"), reference)


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


@pytest.mark.parametrize("input_kind", INPUT_KINDS)
@pytest.mark.parametrize("name", TORCH_VARIANTS)
def test_the_operators_pass_opcheck(
    weights: MoEWeights, name: str, input_kind: InputKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    allclose = torch.allclose

    def allclose_or_same_bytes(one: torch.Tensor, other: torch.Tensor, **options: Any) -> bool:
        if one.dtype is torch.float8_e4m3fn:  # which torch cannot compare, but opcheck asks whether inputs changed
            return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        return allclose(one, other, **options)

    monkeypatch.setattr(torch, "allclose", allclose_or_same_bytes)
    inputs = batch(SHAPE, input_kind=input_kind)
    arguments = (inputs.tokens, *tensors(weights), inputs.topk_weights, inputs.topk_ids, inputs.x_scale, 2.5, name)
    torch.library.opcheck(torch.ops.moe_workbench.fused_moe.default, arguments)
    layer = make_layer(weights, variant=name)
    arguments = (inputs.tokens, inputs.topk_weights, inputs.topk_ids, inputs.x_scale, 2.5, layer._number)
    torch.library.opcheck(torch.ops.moe_workbench.layer.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(weights: MoEWeights, backend: str) -> None:
    layer = make_layer(weights)
    whole = torch.compile(fullgraph=True, backend=backend)

    @whole
    def model(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        first = ops.fused_moe(2 * x, *tensors(weights), topk_weights, topk_ids, variant="torch.loop")
        return layer(first, topk_weights, topk_ids, routed_scaling_factor=2.5) + x

    for num_tokens in (5, 3, 4):
        inputs = batch(SHAPE, num_tokens)
        first = directly("torch.loop", weights, dataclasses.replace(inputs, x=2 * inputs.tokens))
        second = dataclasses.replace(inputs, x=first, routed_scaling_factor=2.5)
        wanted = directly("torch.loop", weights, second) + inputs.tokens
        assert torch.equal(model(inputs.tokens, inputs.topk_weights, inputs.topk_ids), wanted)


def test_a_compiled_call_writes_out(weights: MoEWeights) -> None:
    layer, inputs = make_layer(weights), batch(SHAPE)
    out = torch.full((5, 256), torch.nan, dtype=torch.bfloat16)
    compiled = torch.compile(lambda out: call(layer, inputs, out=out), fullgraph=True, backend="aot_eager")
    assert compiled(out).data_ptr() == out.data_ptr()
    assert torch.equal(out, directly("torch.loop", weights, inputs))
