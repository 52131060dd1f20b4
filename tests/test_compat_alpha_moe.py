"""Alpha-MoE's interface on CPU tensors: the layer from the engine's alignment, added to `out`, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernels_cuda import sm90_fused
from reference.routing import align_block_size
from workbench import compat
from workbench.compat import alpha_moe, vllm
from workbench.errors import InputError, UnsupportedError
from workbench.generate import make_inputs, make_weights
from workbench.problem import MoEInputs, MoEShape, MoEWeights, Workload
from workbench.verify import expected_output

CPU = torch.device("cpu")
SHAPE = MoEShape(5, 256, 128, 3)
M = 11


@pytest.fixture
def weights() -> MoEWeights:
    """With scales of both signs."""
    weights = make_weights(SHAPE, seed=0, device=CPU)
    for scale in (weights.w13_scale, weights.w2_scale):
        scale.mul_(torch.randn(scale.shape).sign())
    return weights


@pytest.fixture
def inputs() -> MoEInputs:
    return make_inputs(Workload(SHAPE, M, input_kind="fp8"), CPU)


def arguments(weights: MoEWeights, inputs: MoEInputs, block_m: int = 16, **others: Any) -> dict[str, Any]:
    """What an engine passes, by name."""
    assert inputs.x_q is not None
    aligned = vllm.moe_align_block_size(inputs.topk_ids, block_m, weights.shape.num_experts)
    given = {
        "x": inputs.x_q,
        "x_scale": inputs.x_scale,
        "w": compat.interleave_tensor(weights.w13, rep=8),
        "w_scale": compat.interleave_tensor(weights.w13_scale, rep=1),
        "w2": weights.w2,
        "w2_scale": weights.w2_scale,
        **dict(zip(("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), aligned, strict=True)),
        "topk_weights": inputs.topk_weights,
        "out": torch.zeros(inputs.num_tokens, weights.shape.hidden_size, dtype=torch.bfloat16),
        "top_k": inputs.topk_ids.shape[1],
        "block_m": block_m,
        "block_n": 64,
        "warp_n": 4,
        "stages": 3,
        "scaling_factor": inputs.routed_scaling_factor,
    }
    return {**given, **others}


def expected(weights: MoEWeights, inputs: MoEInputs) -> torch.Tensor:
    return expected_output(weights, inputs).bfloat16()


def test_interleaving_alternates_gate_and_up_rows() -> None:
    rows = torch.arange(8).view(1, 8, 1)  # 0..3 gate, 4..7 up
    assert compat.interleave_tensor(rows, rep=2).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert compat.interleave_tensor(rows, rep=1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert compat.interleave_tensor(torch.arange(32).view(1, 32, 1)).flatten().tolist()[:17] == [
        *(0, 1, 2, 3, 4, 5, 6, 7),
        *(16, 17, 18, 19, 20, 21, 22, 23),
        8,
    ]


def test_interleaving_needs_whole_chunks() -> None:
    with pytest.raises(
        InputError, match=r"^tensor: expected \[E, N, K\] with N a multiple of 16, got float32 \[2, 24, 4"
    ):
        compat.interleave_tensor(torch.empty(2, 24, 4))


@pytest.mark.parametrize("block_m", range(8, 129, 8))
@pytest.mark.parametrize(("block_n", "warp_n", "stages"), [(64, 4, 1), (32, 8, 5)])
def test_is_the_layer_on_the_engines_alignment(
    weights: MoEWeights, inputs: MoEInputs, block_m: int, block_n: int, warp_n: int, stages: int
) -> None:
    inputs = dataclasses.replace(inputs, routed_scaling_factor=2.5)
    given = arguments(weights, inputs, block_m, block_n=block_n, warp_n=warp_n, stages=stages)
    assert compat.fused_moe_w8a8_up_down(*given.values()) is given["out"]
    assert torch.equal(given["out"], expected(weights, inputs))


def test_adds_to_out(weights: MoEWeights, inputs: MoEInputs) -> None:
    before = torch.randn(M, SHAPE.hidden_size).bfloat16()
    out = compat.fused_moe_w8a8_up_down(**arguments(weights, inputs, out=before.clone()))
    assert torch.equal(out, (before.float() + expected_output(weights, inputs)).bfloat16())


def test_an_expert_chosen_twice_counts_twice_and_top_k_may_exceed_the_experts(weights: MoEWeights) -> None:
    inputs = make_inputs(Workload(SHAPE, M, input_kind="fp8"), CPU)
    topk_ids = torch.randint(0, 5, (M, 9), dtype=torch.int32)
    inputs = dataclasses.replace(inputs, topk_ids=topk_ids, topk_weights=torch.rand(M, 9))
    out = compat.fused_moe_w8a8_up_down(**arguments(weights, inputs))
    assert torch.equal(out, expected(weights, inputs))


def test_blocks_of_no_expert_and_choices_that_no_block_names_contribute_nothing(
    weights: MoEWeights, inputs: MoEInputs
) -> None:
    given = arguments(weights, inputs)
    first = given["expert_ids"][0].item()
    given["expert_ids"][0] = -1
    some = dataclasses.replace(inputs, topk_ids=inputs.topk_ids.masked_fill(inputs.topk_ids == first, -1))
    assert not torch.equal(some.topk_ids, inputs.topk_ids)
    assert torch.equal(compat.fused_moe_w8a8_up_down(**given), expected(weights, some))


def test_what_lies_past_the_used_part_of_the_alignment_is_not_read(weights: MoEWeights, inputs: MoEInputs) -> None:
    given = arguments(weights, inputs)
    used = int(given["num_tokens_post_padded"])
    for name, length in (("sorted_token_ids", used), ("expert_ids", used // 16)):
        garbage = torch.full((given[name].numel() + 7,), 3, dtype=torch.int32)
        garbage[:length] = given[name][:length]
        given[name] = garbage
    assert torch.equal(compat.fused_moe_w8a8_up_down(**given), expected(weights, inputs))


@pytest.mark.parametrize("padding", [M * 3, M * 3 + 1, 2**31 - 1, -1])
def test_any_choice_out_of_range_is_padding(weights: MoEWeights, inputs: MoEInputs, padding: int) -> None:
    given = arguments(weights, inputs)
    given["sorted_token_ids"].masked_fill_(given["sorted_token_ids"] >= M * 3, padding)
    assert torch.equal(compat.fused_moe_w8a8_up_down(**given), expected(weights, inputs))


def test_no_tokens_give_no_rows(weights: MoEWeights) -> None:
    given = arguments(weights, make_inputs(Workload(SHAPE, 0, input_kind="fp8"), CPU))
    assert compat.fused_moe_w8a8_up_down(**given).shape == (0, 256)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_m": 12}, r"block_m: expected 8..128 in steps of 8, got 12"),
        ({"block_m": 136}, r"block_m: expected 8..128 in steps of 8, got 136"),
        ({"block_m": 16.0}, r"block_m: expected 8..128 in steps of 8, got 16.0"),
        ({"block_n": 128}, r"block_n: expected 64 or 32, got 128"),
        ({"warp_n": 8}, r"warp_n: expected 4 with block_n=64, got 8"),
        ({"block_n": 32}, r"warp_n: expected 8 with block_n=32, got 4"),
        ({"stages": 0}, r"stages: expected 1..5, got 0"),
        ({"stages": 6}, r"stages: expected 1..5, got 6"),
        ({"top_k": 0}, r"top_k: expected an integer >= 1, got 0"),
        ({"top_k": 2}, r"topk_weights: expected float32 \[11, 2\], got float32 \[11, 3\]"),
        ({"scaling_factor": math.nan}, r"scaling_factor: expected a finite number, got nan"),
        ({"x": torch.zeros(M, 256)}, r"x: expected float8_e4m3fn \[11, 256\], got float32 \[11, 256\]"),
        ({"x": None}, r"x: expected float8_e4m3fn \[M, 256\], got None"),
        ({"x_scale": torch.zeros(M, 3)}, r"x_scale: expected float32 \[11, 2\], got float32 \[11, 3\]"),
        (
            {"w": torch.zeros(5, 256, 256)},
            r"w: expected float8_e4m3fn \[E, N, K\] with N a multiple of 16, got float32",
        ),
        ({"w_scale": torch.zeros(5, 1, 2)}, r"w_scale: expected float32 \[5, 2, 2\], got float32 \[5, 1, 2\]"),
        ({"w2": torch.zeros(5, 256, 256)}, r"w2: expected float8_e4m3fn \[5, 256, 128\], got float32"),
        ({"w2_scale": torch.zeros(5, 2)}, r"w2_scale: expected float32 \[5, 2, 1\], got float32 \[5, 2\]"),
        ({"out": torch.zeros(M, 256)}, r"out: expected bfloat16 \[11, 256\], got float32"),
        ({"out": torch.zeros(256, M, dtype=torch.bfloat16).T}, r"out: expected a contiguous tensor \[11, 256\]"),
        ({"sorted_token_ids": torch.zeros(16).long()}, r"sorted_token_ids: expected int32 \[16\], got int64 \[16\]"),
        ({"expert_ids": torch.zeros(2, 2).int()}, r"expert_ids: expected int32 of one dimension, got int32 \[2, 2\]"),
        ({"expert_ids": torch.zeros(2).int()}, r"expert_ids: expected one for each of \d+ blocks of 16 sorted"),
        ({"num_tokens_post_padded": 96}, r"num_tokens_post_padded: expected int32 \[1\], got int"),
        (
            {"topk_weights": torch.zeros(M, 3, device="meta")},
            r"topk_weights: expected a tensor on cpu, where w is, got one on meta",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    weights: MoEWeights, inputs: MoEInputs, changed: dict[str, Any], message: str
) -> None:
    given = {**arguments(weights, inputs), **changed}
    with pytest.raises(InputError, match="^" + message):
        compat.fused_moe_w8a8_up_down(**given)
    assert given["out"].float().abs().sum() == 0


def test_the_torch_operator_is_theirs(weights: MoEWeights, inputs: MoEInputs) -> None:
    compat.register_torch_ops()
    compat.register_torch_ops()
    operator = torch.ops.alpha_moe.fused_moe_w8a8_up_down
    assert str(operator.default._schema) == "alpha_moe::fused_moe_w8a8_up_down" + alpha_moe.SCHEMA
    given = arguments(weights, inputs)
    assert operator(*given.values()) is None
    assert torch.equal(given["out"], expected(weights, inputs))


def test_the_torch_operator_passes_opcheck(
    weights: MoEWeights, inputs: MoEInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    allclose = torch.allclose

    def allclose_or_same_bytes(one: torch.Tensor, other: torch.Tensor, **options: Any) -> bool:
        if one.dtype is torch.float8_e4m3fn:  # which torch cannot compare, but opcheck asks whether inputs changed
            return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        return allclose(one, other, **options)

    monkeypatch.setattr(torch, "allclose", allclose_or_same_bytes)
    compat.register_torch_ops()
    given = tuple(arguments(weights, inputs).values())
    torch.library.opcheck(torch.ops.alpha_moe.fused_moe_w8a8_up_down.default, given)


def test_the_torch_operator_compiles_without_a_graph_break(weights: MoEWeights, inputs: MoEInputs) -> None:
    compat.register_torch_ops()
    given = arguments(weights, inputs)
    del given["out"]
    names = list(arguments(weights, inputs))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(tensors: dict[str, Any]) -> torch.Tensor:
        out = torch.zeros(M, 256, dtype=torch.bfloat16)
        torch.ops.alpha_moe.fused_moe_w8a8_up_down(*({**tensors, "out": out}[name] for name in names))
        return 2 * out

    assert torch.equal(compiled(given), 2 * expected(weights, inputs))


@pytest.fixture
def no_modules() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith("alpha_moe")]:
        del sys.modules[name]


def test_a_patched_engine_runs_with_ours_in_its_place(
    weights: MoEWeights, inputs: MoEInputs, no_modules: None, tmp_path: Any
) -> None:
    compat.install_modules()
    compat.install_modules()
    config = tmp_path / "moe_jit.json"
    config.write_text('{"8": {"block_m": 8, "block_n": 32, "warp_n": 8, "stages": 4}}')

    import alpha_moe  # type: ignore[import-not-found]  # noqa: F401
    from alpha_moe_ops import fused_moe_w8a8_up_down  # type: ignore[import-not-found]
    from alpha_moe_python.utils import (  # type: ignore[import-not-found]
        get_best_config,
        interleave_tensor,
    )

    given = arguments(weights, inputs, **get_best_config(str(config), M))
    given["w"] = interleave_tensor(weights.w13)
    torch.ops.alpha_moe.fused_moe_w8a8_up_down(*given.values())
    assert torch.equal(given["out"], expected(weights, inputs))
    given["out"].zero_()
    assert torch.equal(fused_moe_w8a8_up_down(*given.values()), expected(weights, inputs))


def test_the_project_itself_is_not_replaced(no_modules: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alpha_moe", sys)
    with pytest.raises(UnsupportedError, match=r"^alpha_moe: expected it not to be imported yet, got <module 'sys'"):
        compat.install_modules()


@pytest.mark.parametrize("half", [0, 1])
def test_a_box_of_interleaved_weights_is_128_gate_or_up_rows(
    weights: MoEWeights, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sm90_fused.tma, "encode", lambda *given: encoded.append(given) or bytes(128))
    monkeypatch.setattr(sm90_fused.sm90_prologue, "warm", lambda device: None)
    shape = MoEShape(3, 256, 384, 1)
    rows = torch.arange(3 * 768 * 256).view(3, 768, 256)  # each element says where it came from
    w13 = compat.interleave_tensor(rows).flatten()
    sm90_fused.SM90Fused().prepare_interleaved(dataclasses.replace(make_weights(shape, 0, CPU), shape=shape))
    _, sizes, strides, box = encoded[0]
    assert math.prod(sizes) == rows.numel()
    expert, chunk, k = 2, 1, 128
    view = w13.as_strided(sizes[::-1], (*strides[::-1], 1))  # [E, I/8, 2, 8, H]
    start = (expert, chunk * 16, half, 0, k)  # as the kernel asks for a K tile of a chunk
    fetched = view[tuple(slice(first, first + extent) for first, extent in zip(start, box[::-1], strict=True))]
    first_row = half * 384 + chunk * 128
    assert torch.equal(fetched.reshape(128, 128), rows[expert, first_row : first_row + 128, k : k + 128])


def test_the_alignment_of_the_reference_serves_too(weights: MoEWeights, inputs: MoEInputs) -> None:
    aligned = align_block_size(inputs.topk_ids, 32, SHAPE.num_experts)
    given = arguments(
        weights,
        inputs,
        block_m=32,
        sorted_token_ids=aligned.sorted_token_ids,
        expert_ids=aligned.expert_ids,
        num_tokens_post_padded=aligned.num_tokens_post_padded,
    )
    assert torch.equal(compat.fused_moe_w8a8_up_down(**given), expected(weights, inputs))
