"""The public call on a GPU: selection, CUDA graphs, streams, devices, compiled graphs, and errors that need a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench import MoELayer, ops, registry
from workbench.errors import InputError, UnsupportedError
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure, passed, poison
from workbench.problem import INPUT_KINDS, InputKind, MoEInputs, MoEShape, MoEWeights, RoutingLaw, Workload
from workbench.verify import expected_output

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
SHAPE = MoEShape(17, 512, 256, 5, num_shared_experts=1)
M = 33
NAMES = sorted(registry.variants()) if torch.cuda.is_available() else []
CAPTURABLE = [name for name in NAMES if registry.find(name).graph_capturable]
OTHERS = (("zipf:1.2", 0.4), ("one-expert", 0.0), ("uniform", 1.0))


@pytest.fixture(autouse=True)
def _nothing_recorded_or_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    yield
    ops.forget_layers()


@pytest.fixture(scope="module")
def weights() -> MoEWeights:
    return make_weights(SHAPE, seed=0, device=DEVICE)


def make_layer(weights: MoEWeights, variant: str = "auto") -> MoELayer:
    tensors = (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale)
    return MoELayer(*tensors, top_k=SHAPE.top_k, num_shared_experts=1, variant=variant)


def batch(input_kind: InputKind = "bf16", law: str = "uniform", dropped: float = 0.0, seed: int = 0) -> MoEInputs:
    return make_inputs(Workload(SHAPE, M, RoutingLaw.parse(law), seed, input_kind, dropped), DEVICE)


def call(layer: MoELayer, inputs: MoEInputs, out: torch.Tensor | None = None) -> torch.Tensor:
    return layer(inputs.tokens, inputs.topk_weights, inputs.topk_ids, x_scale=inputs.x_scale, out=out)


def assert_right(out: torch.Tensor, weights: MoEWeights, inputs: MoEInputs, tolerance: float = 0.05) -> None:
    accuracy = measure(out, expected_output(weights, inputs), tolerance)
    assert passed(accuracy), accuracy


@pytest.mark.parametrize("input_kind", INPUT_KINDS)
@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_is_the_layer(weights: MoEWeights, name: str, input_kind: InputKind) -> None:
    layer, inputs = make_layer(weights, name), batch(input_kind, dropped=0.4)
    chosen, _ = layer.choice(M, quantised=inputs.quantised)
    assert_right(call(layer, inputs), weights, inputs, registry.find(chosen).tolerance)


@pytest.mark.parametrize("input_kind", INPUT_KINDS)
@pytest.mark.parametrize("name", ["auto", *CAPTURABLE])
def test_a_captured_call_serves_other_tokens_and_routing(weights: MoEWeights, name: str, input_kind: InputKind) -> None:
    layer, static = make_layer(weights, name), batch(input_kind)
    fields = [
        field for field in ("topk_ids", "topk_weights", "x", "x_q", "x_scale") if getattr(static, field) is not None
    ]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(layer, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(layer, static)
    for law, dropped in OTHERS:
        other = batch(input_kind, law, dropped, seed=3)
        for field in fields:
            getattr(static, field).copy_(getattr(other, field))
        poison(out)
        graph.replay()
        assert_right(out, weights, other)


def test_nothing_is_prepared_while_a_graph_is_captured(weights: MoEWeights) -> None:
    layer, inputs = make_layer(weights), batch()
    graph = torch.cuda.CUDAGraph()
    message = f"graph is being captured, but this layer has not been called with M={M} before$"
    with pytest.raises(UnsupportedError, match=message), torch.cuda.graph(graph):
        call(layer, inputs)
    assert_right(call(layer, inputs), weights, inputs)


def test_a_variant_that_waits_for_the_device_is_not_captured(weights: MoEWeights) -> None:
    layer, inputs = make_layer(weights, "torch.loop"), batch()
    call(layer, inputs)
    graph, message = torch.cuda.CUDAGraph(), r"captured, but torch\.loop reads device data on the host$"
    with pytest.raises(UnsupportedError, match=message), torch.cuda.graph(graph):
        call(layer, inputs)


def test_runs_on_a_side_stream(weights: MoEWeights) -> None:
    layer, inputs, side = make_layer(weights), batch(), torch.cuda.Stream()
    reference = call(layer, inputs)
    late = torch.empty_like(inputs.tokens)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a call on another stream would read `late` before it is written
        late.copy_(inputs.tokens)
        out = call(layer, dataclasses.replace(inputs, x=late))
    torch.cuda.current_stream().wait_stream(side)
    assert measure(out, reference, 0.01).rel_err <= 0.01


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_runs_on_a_device_that_is_not_current() -> None:
    second = torch.device("cuda", 1)
    there = make_weights(SHAPE, seed=0, device=second)
    inputs = make_inputs(Workload(SHAPE, M), second)
    with torch.cuda.device(0):
        out = call(make_layer(there), inputs)
    assert out.device == second
    assert_right(out, there, inputs)


def test_a_compiled_call_is_the_layer(weights: MoEWeights) -> None:
    layer, inputs = make_layer(weights), batch()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return layer(2 * x, inputs.topk_weights, inputs.topk_ids)

    assert_right(compiled(inputs.tokens), weights, dataclasses.replace(inputs, x=2 * inputs.tokens))


def test_autocast_and_inference_mode_change_nothing(weights: MoEWeights) -> None:
    layer, inputs = make_layer(weights), batch()
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.float16):
        out = call(layer, inputs)
    assert out.dtype is torch.bfloat16
    assert_right(out, weights, inputs)
    assert_right(call(layer, inputs), weights, inputs)


@pytest.mark.parametrize("name", [name for name in CAPTURABLE if registry.find(name).deterministic])
def test_the_operators_pass_opcheck(weights: MoEWeights, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of variants that give the same bits twice, as opcheck compares runs."""
    allclose = torch.allclose

    def allclose_or_same_bytes(one: torch.Tensor, other: torch.Tensor, **options: Any) -> bool:
        if one.dtype is torch.float8_e4m3fn:  # which torch cannot compare, but opcheck asks whether inputs changed
            return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        return allclose(one, other, **options)

    monkeypatch.setattr(torch, "allclose", allclose_or_same_bytes)
    inputs, layer = batch(), make_layer(weights, name)
    tensors = (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale)
    arguments = (inputs.tokens, *tensors, inputs.topk_weights, inputs.topk_ids, None, 2.5, name, 1)
    torch.library.opcheck(torch.ops.moe_workbench.fused_moe.default, arguments)
    of_layer = (inputs.tokens, inputs.topk_weights, inputs.topk_ids, None, 2.5, layer._number)
    torch.library.opcheck(torch.ops.moe_workbench.layer.default, of_layer)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_all_memory_is_torchs(weights: MoEWeights, name: str) -> None:
    layer, inputs = make_layer(weights, name), batch()
    call(layer, inputs)
    torch.cuda.synchronize()
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    for _ in range(3):
        call(layer, inputs)
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info()[0] == torch.cuda.memory_reserved() - reserved


def test_a_thread_that_has_done_nothing_on_the_gpu_yet(weights: MoEWeights) -> None:
    layer, inputs = make_layer(weights), batch()
    out = poison(call(layer, inputs))
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call, layer, inputs, out).result() is out
    assert_right(out, weights, inputs)


def test_threads_may_launch_the_same_kernels(weights: MoEWeights) -> None:
    layer = make_layer(weights)
    batches = [batch(seed=seed) for seed in range(4)]
    call(layer, batches[0])

    def calls(inputs: MoEInputs) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                out = call(layer, inputs)
            torch.cuda.current_stream().synchronize()
        return out

    torch.cuda.synchronize()
    with ThreadPoolExecutor(len(batches)) as pool:
        outs = list(pool.map(calls, batches))
    for out, inputs in zip(outs, batches, strict=True):
        assert_right(out, weights, inputs)


def test_a_cpu_tensor_is_refused(weights: MoEWeights) -> None:
    layer, inputs = make_layer(weights), batch()
    with pytest.raises(InputError, match=r"^x: expected a tensor on cuda:0, where w13 is, got one on cpu$"):
        call(layer, dataclasses.replace(inputs, x=inputs.tokens.cpu()))
    on_cpu = make_weights(SHAPE, seed=0, device="cpu")
    with pytest.raises(UnsupportedError, match=r"^cuda\.sm90_fused: does not run .* on cpu: needs a GPU"):
        make_layer(on_cpu, "cuda.sm90_fused")


def test_values_are_read_on_the_first_call(weights: MoEWeights) -> None:
    layer, inputs = make_layer(weights), batch("fp8")
    ids = inputs.topk_ids.clone()
    ids[4, 1] = SHAPE.num_experts
    with pytest.raises(InputError, match=r"^topk_ids: expected ids in -1\.\.16, got 17 at \[4, 1\]$"):
        call(layer, dataclasses.replace(inputs, topk_ids=ids))
    assert inputs.x_scale is not None
    scale = inputs.x_scale.clone()
    scale[0, 1] = torch.nan
    with pytest.raises(InputError, match=r"^x_scale: expected finite values, got nan at \[0, 1\]$"):
        call(layer, dataclasses.replace(inputs, x_scale=scale))
