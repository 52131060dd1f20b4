"""`fused_moe` and the torch ops, on the CPU with the PyTorch variants: right, checked, kept once, traceable."""

from __future__ import annotations

import dataclasses
import gc
import math
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_layers import CPU, SHAPE, SHARED, TORCH_VARIANTS, batch, call, call_on_tensors, directly, make_layer, tensors

import workbench
from workbench import checks, ops, registry
from workbench.errors import InputError, UnsupportedError
from workbench.generate import make_weights
from workbench.numerics import measure, passed
from workbench.problem import INPUT_KINDS, InputKind, MoEInputs, MoEShape, MoEWeights
from workbench.verify import expected_output

BF16, FP8 = batch(SHAPE), batch(SHAPE, input_kind="fp8")


@pytest.fixture(autouse=True)
def _nothing_recorded_or_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    yield
    ops.forget_layers()


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


def test_a_layer_that_is_made_again_remembers_nothing(weights: MoEWeights) -> None:
    wrong = dataclasses.replace(BF16, topk_ids=torch.full_like(BF16.topk_ids, 8))
    call_on_tensors(weights, BF16, variant="torch.loop")
    ops.forget_layers()
    with pytest.raises(InputError, match=r"^topk_ids: expected ids in -1..7, got 8 at \[0, 0\]$"):
        call_on_tensors(weights, wrong, variant="torch.loop")


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
    assert not ops._calls


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


def test_views_that_are_made_for_each_call_are_known_and_not_kept(
    weights: MoEWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, check = [], checks.batch
    monkeypatch.setattr(checks, "batch", lambda *given: checked.append(given) or check(*given))
    inputs = batch(SHAPE)
    for _ in range(3):
        views = tuple(tensor.view(tensor.shape) for tensor in tensors(weights))
        ops.fused_moe(inputs.tokens, *views, inputs.topk_weights, inputs.topk_ids, variant="torch.loop")
        watched = [weakref.ref(view) for view in views]
        del views
        assert [watch() for watch in watched] == [None] * 4
    assert len(checked) == len(ops._kept) == len(ops._calls) == 1


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
