"""The interfaces of other projects on a GPU: Alpha-MoE's correctness grid, graphs, memory, and the engines' functions.

The grid is all of that project's shapes, batch sizes and tuning parameters. Weights are made once for each shape and
references once for each batch, and every kernel is compiled ahead, in parallel: what remains is one call and one
comparison on the device for each point.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compat_sglang import RunnerConfig, TopKOutput

from reference.moe import moe
from reference.quant import dequantise_activations, dequantise_w13, dequantise_weights, quantise_activations
from reference.routing import align_block_size
from workbench import compat, ops, registry
from workbench.compat import alpha_moe, sglang, vllm
from workbench.compat.alpha_moe_configs import ALLOWED_BLOCK_M, ALLOWED_STAGES, BestConfig, config_of
from workbench.errors import UnsupportedError
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure, passed
from workbench.precompile import Request, precompile
from workbench.problem import MoEInputs, MoEShape, MoEWeights, Workload
from workbench.verify import expected_output

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
VARIANT = "cuda.sm90_fused"

NUM_EXPERTS, W13_ROWS, HIDDEN_SIZES, BATCH_SIZES = (257, 8, 37), (256, 512), (7168, 4096), (8, 32, 128, 256)
TOP_K, FACTOR = 9, 2.5
TUNINGS = [
    BestConfig(block_m=block_m, block_n=block_n, warp_n=warp_n, stages=stages)
    for block_m in ALLOWED_BLOCK_M
    for block_n, warp_n in ((64, 4), (32, 8))
    for stages in ALLOWED_STAGES
]
GRID = list(itertools.product(NUM_EXPERTS, W13_ROWS, HIDDEN_SIZES))


@pytest.fixture(autouse=True)
def _nothing_recorded_or_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    yield
    ops.forget_layers()


@dataclasses.dataclass
class Weights:
    """The layer in both layouts: as it is served, and as Alpha-MoE has it."""

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor

    def __post_init__(self) -> None:
        self.w = compat.interleave_tensor(self.w13)
        self.w_scale = compat.interleave_tensor(self.w13_scale, rep=1)


def draw_weights(num_experts: int, rows: int, hidden: int) -> Weights:
    """As that project's test draws them: e4m3 of deviation 50, scales of either sign and deviation 0.001."""
    w13 = (50 * torch.randn(num_experts, rows, hidden, device=DEVICE)).to(torch.float8_e4m3fn)
    w2 = (50 * torch.randn(num_experts, hidden, rows // 2, device=DEVICE)).to(torch.float8_e4m3fn)
    w13_scale = 0.001 * torch.randn(num_experts, rows // 128, hidden // 128, device=DEVICE)
    w2_scale = 0.001 * torch.randn(num_experts, hidden // 128, rows // 256, device=DEVICE)
    return Weights(w13, w13_scale, w2, w2_scale)


def draw_batch(num_experts: int, num_tokens: int, hidden: int) -> MoEInputs:
    """Any experts, one perhaps twice, and the last one for every token."""
    routed = torch.randint(0, num_experts - 1, (num_tokens, TOP_K - 1), dtype=torch.int32, device=DEVICE)
    shared = torch.full((num_tokens, 1), num_experts - 1, dtype=torch.int32, device=DEVICE)
    x = (0.05 * torch.randn(num_tokens, hidden, device=DEVICE)).bfloat16()
    topk_weights = torch.randn(num_tokens, TOP_K, device=DEVICE).softmax(dim=1)
    return MoEInputs(torch.cat((routed, shared), dim=1), topk_weights, x=x, routed_scaling_factor=FACTOR).quantise()


def plain(weights: Weights, inputs: MoEInputs) -> torch.Tensor:
    """The layer without quantisation of the activations between the two products: fp32 [M, H]."""
    assert inputs.x_q is not None
    assert inputs.x_scale is not None
    x = dequantise_activations(inputs.x_q, inputs.x_scale)
    out = torch.zeros_like(x)
    for expert in inputs.topk_ids.unique().tolist():
        token, slot = (inputs.topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ dequantise_w13(weights.w13[expert], weights.w13_scale[expert]).T).chunk(2, dim=1)
        rows = (torch.nn.functional.silu(gate) * up) @ dequantise_weights(
            weights.w2[expert], weights.w2_scale[expert]
        ).T
        out.index_add_(0, token, FACTOR * inputs.topk_weights[token, slot].unsqueeze(1) * rows)
    return out


def quantised(weights: Weights, inputs: MoEInputs) -> torch.Tensor:
    """The layer as reference/ defines it: fp32 [M, H]."""
    assert inputs.x_q is not None
    assert inputs.x_scale is not None
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
    )


def call(weights: Weights, inputs: MoEInputs, aligned: tuple[torch.Tensor, ...], **others: Any) -> torch.Tensor:
    assert inputs.x_q is not None
    given = {
        "x": inputs.x_q,
        "x_scale": inputs.x_scale,
        "w": weights.w,
        "w_scale": weights.w_scale,
        "w2": weights.w2,
        "w2_scale": weights.w2_scale,
        **dict(zip(("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), aligned, strict=True)),
        "topk_weights": inputs.topk_weights,
        "out": torch.zeros(inputs.x_q.shape, dtype=torch.bfloat16, device=inputs.x_q.device),
        "top_k": inputs.topk_ids.shape[1],
        "scaling_factor": inputs.routed_scaling_factor,
    }
    return compat.fused_moe_w8a8_up_down(**{**given, **others})


@pytest.fixture(scope="module")
def compiled() -> None:
    """Every kernel of the grid is in the compiler's cache."""
    shapes = [MoEShape(experts, hidden, rows // 2, min(TOP_K, experts)) for experts, rows, hidden in GRID]
    points = itertools.product(shapes, BATCH_SIZES, TUNINGS)
    configs = {config_of(*point): point[0] for point in points}
    precompile(Request(VARIANT, shape, config) for config, shape in configs.items())


@pytest.mark.parametrize(("num_experts", "rows", "hidden"), GRID)
def test_the_correctness_grid(num_experts: int, rows: int, hidden: int, compiled: None) -> None:
    weights = draw_weights(num_experts, rows, hidden)
    tolerance = registry.find(VARIANT).tolerance
    points: list[tuple[int, BestConfig]] = []
    wrong: list[torch.Tensor] = []
    for num_tokens in BATCH_SIZES:
        inputs = draw_batch(num_experts, num_tokens, hidden)
        with_q, without_q = quantised(weights, inputs), plain(weights, inputs)
        norm = with_q.norm()
        for block_m, tunings in itertools.groupby(TUNINGS, key=lambda tuning: tuning["block_m"]):
            aligned = sglang.moe_align_block_size(inputs.topk_ids, block_m, num_experts)
            for tuning in tunings:
                out = call(weights, inputs, aligned, **tuning).float()
                points.append((num_tokens, tuning))
                far = ~torch.isclose(out, without_q, rtol=1e-1, atol=2e-2) | ~torch.isclose(
                    out, with_q, rtol=1e-2, atol=2e-2
                )
                wrong.append(far.any() | ~((out - with_q).norm() <= tolerance * norm))
    flags = torch.stack(wrong).tolist()
    assert len(flags) == len(BATCH_SIZES) * 16 * 2 * 5
    assert [point for point, flag in zip(points, flags, strict=True) if flag] == []


SHAPE = MoEShape(37, 512, 256, TOP_K)
TUNING = BestConfig(block_m=16, block_n=32, warp_n=8, stages=4)
M = 33


@pytest.fixture
def weights() -> Weights:
    return draw_weights(SHAPE.num_experts, SHAPE.w13_rows, SHAPE.hidden_size)


@pytest.fixture
def inputs() -> MoEInputs:
    return draw_batch(SHAPE.num_experts, M, SHAPE.hidden_size)


def align(inputs: MoEInputs, block_m: int = TUNING["block_m"]) -> tuple[torch.Tensor, ...]:
    return vllm.moe_align_block_size(inputs.topk_ids, block_m, SHAPE.num_experts)


def assert_right(out: torch.Tensor, reference: torch.Tensor, tolerance: float = 0.03) -> None:
    accuracy = measure(out, reference, tolerance)
    assert passed(accuracy), accuracy


def test_adds_to_out_and_returns_it(weights: Weights, inputs: MoEInputs) -> None:
    reference = quantised(weights, inputs)
    out = reference.bfloat16()
    assert call(weights, inputs, align(inputs), **TUNING, out=out) is out
    assert_right(out, 2 * reference)


def test_blocks_of_no_expert_are_skipped(weights: Weights, inputs: MoEInputs) -> None:
    inputs.topk_ids[:, ::2] = -1
    aligned = sglang.moe_align_block_size(inputs.topk_ids, TUNING["block_m"], SHAPE.num_experts)
    assert aligned[1][0] == -1
    assert_right(call(weights, inputs, aligned, **TUNING), quantised(weights, inputs))


def test_nothing_past_the_used_part_of_the_alignment_is_read(weights: Weights, inputs: MoEInputs) -> None:
    sorted_token_ids, expert_ids, total = align(inputs)
    used = int(total)
    sorted_token_ids[used:] = 2**31 - 1
    expert_ids[used // TUNING["block_m"] :] = 2**31 - 1
    out = call(weights, inputs, (sorted_token_ids, expert_ids, total), **TUNING)
    assert_right(out, quantised(weights, inputs))


def test_weights_are_read_as_they_lie(weights: Weights, inputs: MoEInputs) -> None:
    aligned = align(inputs)
    out = torch.zeros(M, SHAPE.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    call(weights, inputs, aligned, **TUNING, out=out)
    assert torch.cuda.memory_allocated() == before
    weights.w.view(torch.uint8).zero_()
    assert not call(weights, inputs, aligned, **TUNING).any()


def test_freed_weights_are_released(weights: Weights, inputs: MoEInputs) -> None:
    alpha_moe._layers.clear()
    other = draw_weights(SHAPE.num_experts, SHAPE.w13_rows, SHAPE.hidden_size)
    for some in (weights, other, weights):
        call(some, inputs, align(inputs), **TUNING)
    assert len(alpha_moe._layers) == 2
    del some, other
    gc.collect()
    (left,) = alpha_moe._layers
    assert left[0] == (weights.w.data_ptr(), weights.w.shape)


def test_a_step_of_an_engine_is_captured_and_replayed_with_other_routing(weights: Weights, inputs: MoEInputs) -> None:
    static = [inputs.topk_ids, inputs.topk_weights, dequantise_activations(inputs.x_q, inputs.x_scale).bfloat16()]
    topk_ids, topk_weights, x = static

    def step() -> torch.Tensor:
        x_q, x_scale = sglang.sglang_per_token_group_quant_fp8(x, 128)
        batch = MoEInputs(topk_ids, topk_weights, x_q=x_q, x_scale=x_scale, routed_scaling_factor=FACTOR)
        return call(weights, batch, sglang.moe_align_block_size(topk_ids, 16, SHAPE.num_experts), **TUNING)

    out, graph = captured(step)
    for _ in range(3):
        other = draw_batch(SHAPE.num_experts, M, SHAPE.hidden_size)
        other.topk_ids[:, 1::3] = -1
        tokens = dequantise_activations(other.x_q, other.x_scale).bfloat16()
        for kept, new in zip(static, (other.topk_ids, other.topk_weights, tokens), strict=True):
            kept.copy_(new)
        graph.replay()
        again = dataclasses.replace(other, x=tokens, x_q=None, x_scale=None).quantise()
        assert_right(out, quantised(weights, again))


def captured(step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.cuda.CUDAGraph]:
    """What `step` returns in a graph, after it has run once outside of one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return out, graph


def test_nothing_is_prepared_while_a_graph_is_captured(weights: Weights, inputs: MoEInputs) -> None:
    aligned = align(inputs)
    for message in (r"weights are prepared on their first call$", r"has not been made with M=33 and .* before$"):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(UnsupportedError, match=message), torch.cuda.graph(graph):
            call(weights, inputs, aligned, **TUNING)
        call(weights, inputs, align(inputs, 8), **{**TUNING, "block_m": 8})  # prepares, for other parameters


def test_the_torch_operator_compiles_without_a_graph_break(weights: Weights, inputs: MoEInputs) -> None:
    compat.register_torch_ops()
    aligned = align(inputs)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(M, SHAPE.hidden_size, dtype=torch.bfloat16, device=DEVICE)
        torch.ops.alpha_moe.fused_moe_w8a8_up_down(
            *(x, inputs.x_scale, weights.w, weights.w_scale, weights.w2, weights.w2_scale),
            *(*aligned, inputs.topk_weights, out, TOP_K, *TUNING.values(), FACTOR),
        )
        return 2 * out

    assert_right(compiled(inputs.x_q), 2 * quantised(weights, inputs))


def test_a_shape_that_the_kernel_does_not_serve_is_refused_with_the_reason() -> None:
    weights, inputs = make_weights(MoEShape(8, 256, 192, 2), 0, DEVICE), draw_batch(8, 4, 256)
    served = Weights(weights.w13, weights.w13_scale, weights.w2, weights.w2_scale)
    aligned = vllm.moe_align_block_size(inputs.topk_ids, 16, 8)
    message = r"^cuda\.sm90_fused: does not run .* intermediate_size must be a multiple of 128, got 192$"
    with pytest.raises(UnsupportedError, match=message):
        call(served, inputs, aligned, **TUNING)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_tokens", "block_size"), [(0, 16), (1, 64), (33, 8), (700, 128)])
def test_alignment_is_the_references(num_tokens: int, block_size: int, dtype: torch.dtype) -> None:
    topk_ids = torch.randint(-1, 38, (num_tokens, 5), dtype=dtype, device=DEVICE)  # -1 and 37 are no experts
    sorted_ids, expert_ids, total = vllm.moe_align_block_size(topk_ids, block_size, 37, pad_sorted_ids=True)
    wanted = align_block_size(topk_ids.masked_fill(topk_ids == 37, -1).int(), block_size, 37)
    assert torch.equal(total, wanted.num_tokens_post_padded)
    num_blocks = int(total) // block_size
    assert torch.equal(expert_ids, wanted.expert_ids)
    group = wanted.expert_ids[:num_blocks].repeat_interleave(block_size).long() << 32  # order within one is not fixed
    used = int(total)
    assert sorted_ids.numel() == wanted.sorted_token_ids.numel()
    assert torch.equal(
        (group + sorted_ids[:used]).sort().values, (group + wanted.sorted_token_ids[:used]).sort().values
    )
    assert (sorted_ids[used:] == topk_ids.numel()).all()


@pytest.mark.parametrize("num_tokens", [0, 1, 700])
def test_quantisation_is_the_references_bit_for_bit(num_tokens: int) -> None:
    x = torch.randn(num_tokens, 7168, device=DEVICE).bfloat16()
    wanted_q, wanted = quantise_activations(x)
    for x_q, scale in (
        vllm.per_token_group_quant_fp8(x, 128, column_major_scales=True, tma_aligned_scales=True),
        sglang.sglang_per_token_group_quant_fp8(x, 128),
    ):
        assert torch.equal(x_q.view(torch.uint8), wanted_q.view(torch.uint8))
        assert torch.equal(scale, wanted)


@pytest.fixture(scope="module")
def served() -> MoEWeights:
    return make_weights(MoEShape(12, 512, 256, 4), 0, DEVICE)


def test_vllms_fused_experts_with_an_expert_map(served: MoEWeights) -> None:
    inputs = make_inputs(Workload(served.shape, M), DEVICE)
    here = torch.tensor([10, 2, 3, 7], device=DEVICE)
    expert_map = torch.full((12,), -1, dtype=torch.int32, device=DEVICE)
    expert_map[here] = torch.arange(4, dtype=torch.int32, device=DEVICE)
    out = vllm.fused_experts(
        inputs.tokens.clone(),
        served.w13[here],
        served.w2[here],
        inputs.topk_weights,
        inputs.topk_ids.long(),
        inplace=True,
        use_fp8_w8a8=True,
        global_num_experts=12,
        expert_map=expert_map,
        w1_scale=served.w13_scale[here],
        w2_scale=served.w2_scale[here],
        block_shape=[128, 128],
    )
    elsewhere = ~torch.isin(inputs.topk_ids, here)
    inputs = dataclasses.replace(inputs, topk_ids=inputs.topk_ids.masked_fill(elsewhere, -1))
    assert_right(out, expected_output(served, inputs))


def test_sglangs_fused_experts_in_a_graph(served: MoEWeights) -> None:
    inputs = make_inputs(Workload(served.shape, M, dropped=0.3), DEVICE)

    def step() -> torch.Tensor:
        return sglang.fused_experts(
            inputs.tokens,
            served.w13,
            served.w2,
            TopKOutput(inputs.topk_weights, inputs.topk_ids),
            RunnerConfig(inplace=False, routed_scaling_factor=FACTOR),
            use_fp8_w8a8=True,
            w1_scale=served.w13_scale,
            w2_scale=served.w2_scale,
            block_shape=[128, 128],
        )

    out, graph = captured(step)
    inputs.tokens.normal_()
    graph.replay()
    assert_right(out, expected_output(served, dataclasses.replace(inputs, routed_scaling_factor=FACTOR)))


def test_the_router_weight_on_the_input(served: MoEWeights) -> None:
    inputs = make_inputs(Workload(MoEShape(12, 512, 256, 1), M), DEVICE)
    topk_weights = torch.rand(M, 1, device=DEVICE)
    out = vllm.fused_experts(
        inputs.tokens,
        served.w13,
        served.w2,
        topk_weights,
        inputs.topk_ids,
        apply_router_weight_on_input=True,
        use_fp8_w8a8=True,
        w1_scale=served.w13_scale,
        w2_scale=served.w2_scale,
        block_shape=[128, 128],
    )
    batch = dataclasses.replace(inputs, topk_weights=torch.ones_like(topk_weights)).quantise()
    assert batch.x_scale is not None
    assert_right(out, expected_output(served, dataclasses.replace(batch, x_scale=batch.x_scale * topk_weights)))
