"""cuda.sm90_prefill without a GPU: what the compiler makes of it, what it offers and refuses, and what it computes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulation.emulator import compiler_missing, emulated

from kernels_cuda.sm90 import SMEM_BYTES
from kernels_cuda.sm90_prefill import SM90Prefill, SM90PrefillDeterministic, is_wide
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import MoEShape, RoutingLaw, Workload
from workbench.variant import Config
from workbench.verify import expected_output

CPU = torch.device("cpu")
NARROW = [shape_of_alias(alias) for alias in ("dsv3_tp16", "dsv3_tp8", "qwen3next_tp4")]
WIDE = MoEShape(8, 4096, 1792, 2)


@pytest.mark.parametrize("variant", [SM90Prefill(), SM90PrefillDeterministic()], ids=lambda variant: variant.name)
@pytest.mark.parametrize("shape", [*NARROW, WIDE], ids=str)
def test_the_default_compiles_without_spills_or_warnings(variant: SM90Prefill, shape: MoEShape) -> None:
    default = next(iter(variant.configs(shape, 8192)))
    for report in variant.compile(shape, [default]):
        assert report.clean, report
        assert report.static_smem_bytes + report.dynamic_smem_bytes <= SMEM_BYTES


@pytest.mark.parametrize("shape", [*NARROW, WIDE], ids=str)
def test_configs_differ_and_name_a_down_phase_where_there_is_a_choice(shape: MoEShape) -> None:
    configs = list(SM90Prefill().configs(shape, 4096))
    assert len(set(configs)) == len(configs) >= 2
    assert all(("num_warpgroups" in config) != is_wide(shape) for config in configs)


def test_tiles_are_low_where_an_expert_has_few_rows() -> None:
    first = [next(iter(SM90Prefill().configs(NARROW[0], tokens)))["max_rows"] for tokens in (1024, 2048, 4096, 8192)]
    assert first == [128, 128, 160, 272]


@pytest.mark.parametrize(("intermediate_size", "expected"), [(128, {128, 160, 192, 272}), (65_536, {128, 160, 192})])
def test_a_height_needs_room_for_a_ring_of_four_stages(intermediate_size: int, expected: set[int]) -> None:
    configs = SM90Prefill().configs(MoEShape(8, 7168, intermediate_size, 2), 8192)
    assert {config["max_rows"] for config in configs} == expected


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (MoEShape(8, 200, 128, 2), "hidden_size must be a multiple of 128 up to 32640, got 200"),
        (MoEShape(8, 256, 192, 2), "intermediate_size must be a multiple of 128, got 192"),
        (MoEShape(8, 256, 128, 2, has_bias=True), "has_bias: expected False, got True"),
        (MoEShape(2048, 256, 128, 2), "at most 1024 experts, got 2048"),
    ],
)
def test_a_shape_it_cannot_serve_is_refused_with_the_reason(shape: MoEShape, reason: str) -> None:
    support = SM90Prefill().supports_shape(shape)
    assert not support
    assert support.reason == reason


def emulate(
    variant: SM90Prefill,
    workload: Workload,
    config: Config,
    seed: int,
    aligned_ahead: bool = False,
    topk_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and what the reference says of it, with other ids than the workload's where they are given."""
    weights, inputs = make_weights(workload.shape, seed=0, device=CPU), make_inputs(workload, CPU)
    if topk_ids is not None:
        inputs = dataclasses.replace(inputs, topk_ids=topk_ids)
    out = torch.full((workload.num_tokens, workload.shape.hidden_size), torch.nan, dtype=torch.bfloat16)
    expected = expected_output(weights, inputs)
    with emulated(num_sms=4, seed=seed):
        prepared = variant.prepare(weights)
        batch = variant.align(prepared, inputs, config) if aligned_ahead else inputs
        variant.run(prepared, batch, out, config)
    return out.float(), expected


@pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing() or "there")
@pytest.mark.parametrize(
    ("workload", "aligned_ahead"),
    [
        (Workload(MoEShape(3, 256, 128, 2), 9, input_kind="fp8"), True),
        (Workload(MoEShape(3, 512, 128, 2), 260, dropped=0.4), False),
        (Workload(MoEShape(2, 640, 256, 2), 40, RoutingLaw.parse("one-expert")), True),
        (Workload(MoEShape(4, 1152, 384, 2), 33), False),
        (Workload(MoEShape(2, 7168, 128, 1), 9, RoutingLaw.parse("one-expert")), True),
    ],
    ids=["aligned ahead", "choices dropped", "two chunks", "wide", "an item shared by two clusters"],
)
def test_it_is_right_under_any_interleaving(workload: Workload, aligned_ahead: bool) -> None:
    for seed, config in enumerate(SM90Prefill().configs(workload.shape, workload.num_tokens)):
        out, expected = emulate(SM90Prefill(), workload, config, seed, aligned_ahead)
        assert (out - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing() or "there")
@pytest.mark.parametrize(
    ("shape", "times"),
    [
        (MoEShape(4, 1280, 128, 3, num_shared_experts=1), (1,)),
        (MoEShape(4, 1024, 256, 3, num_shared_experts=1), (1, 0)),
        (MoEShape(4, 1280, 128, 3, num_shared_experts=1), (1, 0, 2, 1, 3)),
    ],
    ids=["every token has it", "some tokens have it not", "some have it more than once"],
)
def test_rows_of_a_shared_expert_are_stored_before_others_are_added(shape: MoEShape, times: tuple[int, ...]) -> None:
    num_tokens, last = 70, shape.num_experts - 1
    generator = torch.Generator().manual_seed(0)
    topk_ids = torch.rand(num_tokens, last, generator=generator).argsort(dim=1)[:, : shape.top_k].int()
    for token in range(num_tokens):
        topk_ids[token, : times[token % len(times)]] = last
    configs = list(SM90Prefill().configs(shape, num_tokens))
    slabs = [config for config in configs if config["max_rows"] == configs[0]["max_rows"]]  # of each width
    for seed, config in enumerate(slabs):
        workload = Workload(shape, num_tokens)
        out, expected = emulate(SM90Prefill(), workload, config, seed, aligned_ahead=seed % 2 == 0, topk_ids=topk_ids)
        assert (out - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing() or "there")
def test_the_deterministic_form_gives_the_same_bits_under_any_interleaving() -> None:
    variant, workload = SM90PrefillDeterministic(), Workload(MoEShape(3, 512, 128, 2), 21, input_kind="fp8")
    config = next(iter(variant.configs(workload.shape, workload.num_tokens)))
    first, expected = emulate(variant, workload, config, seed=1)
    second, _ = emulate(variant, workload, config, seed=2)
    assert torch.equal(first, second)
    assert (first - expected).norm() <= 0.01 * expected.norm()
