"""CUDA variants on the CPU, through tests/emulation: what their kernels compute under many interleavings, and that the
emulation finds the mistakes it is there to find."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from emulation import emulator
from emulation.emulator import Device, EmulationError, Grid, Kernel, Source, emulate, emulated

from kernels_cuda import compile as cuda_compile
from kernels_cuda import sm90_order, sm90_prologue, weight_tiles
from kernels_cuda.sm90_fused import SM90Fused, most_stages
from kernels_cuda.sm90_stream import SM90Stream, SM90StreamDeterministic, SM90StreamInPlace, taken
from reference.layout import interleave
from reference.quant import quantise_activations
from reference.routing import align_block_size, tile_rows
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure
from workbench.problem import MoEInputs, MoEShape, MoEWeights, RoutingLaw, Workload
from workbench.variant import Config, Variant
from workbench.verify import expected_output

pytestmark = pytest.mark.skipif(bool(emulator.compiler_missing()), reason=emulator.compiler_missing())

CPU = torch.device("cpu")
TOLERANCE = 0.01
SEEDS = range(3)


def batch(shape: MoEShape, num_tokens: int, law: str = "uniform", **options) -> tuple[MoEWeights, MoEInputs]:
    workload = Workload(shape, num_tokens, RoutingLaw.parse(law), **options)
    return make_weights(shape, seed=0, device=CPU), make_inputs(workload, device=CPU)


def output(
    variant: Variant, weights: MoEWeights, inputs: MoEInputs, config: Config, num_sms: int, seed: int, aligned: bool
) -> torch.Tensor:
    """What `variant` computes under one interleaving, from aligned inputs or the caller's."""
    out = torch.full((inputs.num_tokens, weights.shape.hidden_size), torch.nan, dtype=torch.bfloat16)
    with emulated(num_sms, seed):
        prepared = variant.prepare(weights)
        variant.run(prepared, variant.align(prepared, inputs, config) if aligned else inputs, out, config)
    return out


def error(out: torch.Tensor, weights: MoEWeights, inputs: MoEInputs) -> float:
    return measure(out, expected_output(weights, inputs), TOLERANCE).rel_err


# ---- sm90_fused


def fused_config(block_m: int, cluster_size: int, num_stages: int) -> Config:
    assert num_stages <= most_stages(block_m, cluster_size)
    return Config(block_m=block_m, cluster_size=cluster_size, num_stages=num_stages)


@pytest.mark.parametrize("law", ["uniform", "one-expert"])
@pytest.mark.parametrize(
    ("block_m", "cluster_size", "num_stages"), [(8, 1, 2), (8, 2, 3), (16, 2, 2), (16, 4, 3), (96, 1, 3)]
)
def test_fused_is_right_under_any_interleaving(block_m, cluster_size, num_stages, law):
    weights, inputs = batch(MoEShape(5, 640, 256, 2), 21, law, dropped=0.2)
    config = fused_config(block_m, cluster_size, num_stages)
    for seed in SEEDS:
        out = output(SM90Fused(), weights, inputs, config, num_sms=8, seed=seed, aligned=seed % 2 == 0)
        assert error(out, weights, inputs) < TOLERANCE


def test_fused_takes_interleaved_weights():
    weights, inputs = batch(MoEShape(3, 384, 256, 2), 9)
    shape, config = weights.shape, fused_config(8, 1, 2)
    interleaved = MoEWeights(
        shape, interleave(weights.w13, 8), interleave(weights.w13_scale, 1), weights.w2, weights.w2_scale
    )
    out = torch.full((inputs.num_tokens, shape.hidden_size), torch.nan, dtype=torch.bfloat16)
    with emulated(num_sms=4):
        SM90Fused().run(SM90Fused().prepare_interleaved(interleaved), inputs, out, config)
    assert error(out, weights, inputs) < TOLERANCE


# ---- sm90_stream


def stream_config(variant: Variant, weights: MoEWeights, num_tokens: int, max_rows: int) -> Config:
    return next(c for c in variant.configs(weights.shape, num_tokens) if c["max_rows"] == max_rows)


FEW_JOBS = (MoEShape(8, 640, 256, 2), 1, 8, 16)
"""16 CTAs for 4 jobs: each has at most one piece of a phase."""

MANY_TILES = (MoEShape(64, 512, 128, 2), 80, 8, 4)
"""About 75 tiles for 4 CTAs: with 4 parts fused ones, else whole, quartered and fine pieces."""

WITHOUT_FUSED = (MoEShape(20, 768, 128, 2), 40, 8, 16)
"""16 to 20 tiles for 16 CTAs: quartered and fine pieces, and activations of the first ones while others sum up."""

TWO_CHUNKS = (MoEShape(8, 640, 256, 2), 40, 32, 5)
"""With 4 parts 5 fused tiles of 2 chunks, and 6 jobs in parts beside them."""

MANY_CHUNKS = (MoEShape(6, 384, 1024, 2), 30, 16, 3)
"""3 fused tiles of more chunks than the ring has stages, and half a group of columns."""

BEYOND_THE_TABLE = (MoEShape(560, 256, 128, 4), 600, 16, 6)
"""More tiles than a CTA keeps."""

TALL = (MoEShape(4, 1152, 128, 2), 60, 64, 6)
TALLEST = (MoEShape(4, 640, 128, 2), 90, 96, 6)
TALL_OF_TWO_CHUNKS = (MoEShape(6, 384, 256, 2), 120, 80, 3)
SHORT_K = (MoEShape(3, 256, 128, 2), 9, 16, 8)
"""Fewer pieces of the up phase than CTAs: some begin with the down phase."""


@pytest.mark.parametrize(
    ("case", "max_parts", "law", "dropped"),
    [
        (FEW_JOBS, 16, "uniform", 0.0),
        (WITHOUT_FUSED, 8, "uniform", 0.0),
        (MANY_TILES, 4, "uniform", 0.0),
        (MANY_TILES, 8, "uniform", 0.0),
        (TWO_CHUNKS, 4, "uniform", 0.3),
        (TWO_CHUNKS, 4, "one-expert", 0.0),
        (TWO_CHUNKS, 8, "uniform", 0.0),
        (MANY_CHUNKS, 4, "uniform", 0.3),
        (BEYOND_THE_TABLE, 4, "uniform", 0.0),
        (TALL, 4, "zipf:1.2", 0.3),
        (TALL, 8, "one-expert", 0.0),
        (TALLEST, 4, "one-expert", 0.0),
        (TALL_OF_TWO_CHUNKS, 4, "zipf:1.2", 0.0),
        (SHORT_K, 16, "uniform", 0.0),
    ],
)
def test_stream_is_right_under_any_interleaving(case, max_parts, law, dropped):
    shape, num_tokens, max_rows, num_sms = case
    weights, inputs = batch(shape, num_tokens, law, dropped=dropped)
    config = Config(**{**stream_config(SM90Stream(), weights, num_tokens, max_rows), "max_parts": max_parts})
    for seed in SEEDS:
        out = output(SM90Stream(), weights, inputs, config, num_sms, seed, aligned=seed % 2 == 0)
        assert error(out, weights, inputs) < TOLERANCE


@pytest.mark.parametrize(
    ("num_tokens", "max_rows", "takes"),
    [(1, 8, "ids"), (50, 24, "ids"), (170, 64, "ids"), (300, 16, "choices"), (470, 48, "choices"), (470, 8, "choices")],
)
@pytest.mark.parametrize("variant", [SM90Stream(), SM90StreamDeterministic()], ids=lambda variant: variant.name)
def test_ctas_list_the_tiles_and_order_the_choices_themselves(variant, num_tokens, max_rows, takes):
    weights, inputs = batch(MoEShape(40, 256, 128, 6), num_tokens, "zipf:1.2", dropped=0.3)
    inputs.topk_ids[:, -1] = inputs.topk_ids[:, 0]  # an expert twice
    config = stream_config(variant, weights, num_tokens, max_rows)
    assert taken(weights.shape, num_tokens, config) == takes
    for given in (inputs, inputs.quantise()):
        out = output(variant, weights, given, config, num_sms=8, seed=num_tokens, aligned=False)
        assert error(out, weights, inputs) < TOLERANCE


def test_stream_without_a_single_choice_gives_zeros():
    weights, inputs = batch(SHORT_K[0], 9, dropped=1.0)
    config = stream_config(SM90Stream(), weights, 9, max_rows=16)
    assert (output(SM90Stream(), weights, inputs, config, num_sms=8, seed=0, aligned=False) == 0).all()


def test_deterministic_stream_gives_the_same_bits_under_any_interleaving_and_in_any_batch():
    shape, num_tokens, max_rows, num_sms = TWO_CHUNKS
    weights, inputs = batch(shape, num_tokens)
    variant = SM90StreamDeterministic()
    config = stream_config(variant, weights, num_tokens, max_rows)
    outs = [output(variant, weights, inputs, config, num_sms, seed, aligned=False) for seed in SEEDS]
    assert error(outs[0], weights, inputs) < TOLERANCE
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
    few = MoEInputs(inputs.topk_ids[:3], inputs.topk_weights[:3], x=inputs.tokens[:3])
    assert torch.equal(output(variant, weights, few, config, num_sms, seed=0, aligned=False), outs[0][:3])


OF_192_CHANNELS = MoEShape(8, 640, 192, 2)
OF_176_CHANNELS = MoEShape(6, 384, 176, 3)
"""Chunks that end past I, and half a group of columns at the end."""


@pytest.mark.parametrize(
    ("shape", "num_tokens", "max_rows", "max_parts", "num_sms", "takes"),
    [
        (OF_192_CHANNELS, 2, 8, 16, 16, "ids"),
        (OF_192_CHANNELS, 90, 80, 4, 3, "ids"),
        (OF_176_CHANNELS, 40, 32, 8, 5, "choices"),
        (OF_176_CHANNELS, 30, 16, 4, 3, "tiles"),
    ],
)
def test_in_place_the_stream_reads_weights_as_they_are_served(shape, num_tokens, max_rows, max_parts, num_sms, takes):
    weights, inputs = batch(shape, num_tokens, "zipf:1.2", dropped=0.3)
    inputs.topk_ids[:, -1] = inputs.topk_ids[:, 0]  # an expert twice
    variant = SM90StreamInPlace()
    config = Config(**{**stream_config(variant, weights, num_tokens, max_rows), "max_parts": max_parts})
    if takes == "choices":
        config = Config(**{**config, "num_in_flight": config["num_stages"]})
    assert takes in ("tiles", taken(shape, num_tokens, config))
    for seed in SEEDS[:2]:
        out = output(variant, weights, inputs, config, num_sms, seed, aligned=takes == "tiles")
        assert error(out, weights, inputs) < TOLERANCE


def test_in_place_the_stream_keeps_no_copy_and_sees_what_is_written():
    variant = SM90StreamInPlace()
    weights, inputs = batch(OF_192_CHANNELS, 2)
    others = make_weights(OF_192_CHANNELS, seed=1, device=CPU)
    config = stream_config(variant, weights, 2, max_rows=8)
    out = torch.full((2, OF_192_CHANNELS.hidden_size), torch.nan, dtype=torch.bfloat16)
    with emulated(num_sms=16) as gpu:
        prepared = variant.prepare(weights)
        assert prepared.tiles is None
        variant.run(prepared, inputs, out, config)
        gpu.synchronize()
        assert error(out, weights, inputs) < TOLERANCE < error(out, others, inputs)
        for served, written in zip(weights.tensors, others.tensors, strict=True):
            served.copy_(written)
        variant.run(prepared, inputs, out, config)
    assert error(out, others, inputs) < TOLERANCE


# ---- sm90_prologue


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "max_rows", "dropped"),
    [
        (1, 9, 257, 8, 0.0),
        (3, 4, 5, 8, 0.4),
        (64, 10, 512, 64, 0.4),
        (5, 2, 8, 8, 1.0),
        (128, 8, 16, 8, 0.1),
        (129, 8, 16, 8, 0.0),
        (60, 6, 24, 16, 0.2),
        (128, 8, 1024, 16, 0.0),
        (300, 8, 40, 128, 0.0),
        (700, 3, 5, 272, 0.3),
        (1021, 3, 6, 504, 0.0),  # the highest tiles there may be, about one each
    ],
)
def test_prologue_groups_quantises_and_fills(num_tokens, top_k, num_experts, max_rows, dropped):
    generator = torch.Generator().manual_seed(0)
    topk_ids = torch.rand(num_tokens, num_experts, generator=generator).topk(min(top_k, num_experts), 1).indices.int()
    topk_ids[torch.rand(topk_ids.shape, generator=generator) < dropped] = -1
    x = torch.randn(num_tokens, 256, generator=generator).bfloat16()
    out, poison = torch.full((num_tokens, 256), torch.nan), torch.zeros(num_tokens * 48, dtype=torch.uint8)
    for seed in SEEDS:
        with emulated(num_sms=8, seed=seed):
            quantised = sm90_prologue.empty_quantised(x)
            tiled = sm90_prologue.empty_tiles(topk_ids.numel(), num_experts, max_rows, CPU)
            aligned = sm90_prologue.empty_alignment(topk_ids.numel(), num_experts, max_rows, CPU)
            routing = {"topk_ids": topk_ids.contiguous(), "num_experts": num_experts}
            sm90_prologue.launch(out=out, x=x, quantised=quantised, **routing, aligned=tiled, poison=poison)
            sm90_prologue.launch(**routing, aligned=aligned)

        x_q, x_scale = quantise_activations(x)
        assert torch.equal(quantised[0].view(torch.uint8), x_q.view(torch.uint8))
        assert torch.equal(quantised[1], x_scale)
        assert (out == 0).all()
        assert (poison == 0xFF).all()

        expert_of = torch.cat([topk_ids.flatten(), torch.tensor([num_experts])])
        expected = tile_rows(topk_ids, max_rows, num_experts)
        num_rows = int(expected.tiles[0, 1])
        assert torch.equal(tiled.tiles, expected.tiles)
        choices, expected_choices = tiled.sorted_choices[:num_rows], expected.sorted_choices[:num_rows]
        assert torch.equal(expert_of[choices], expert_of[expected_choices])
        assert torch.equal(choices.sort().values, expected_choices.sort().values)

        blocks = align_block_size(topk_ids, max_rows, num_experts)
        assert torch.equal(aligned.num_tokens_post_padded, blocks.num_tokens_post_padded)
        assert torch.equal(aligned.expert_ids, blocks.expert_ids)
        assert torch.equal(expert_of[aligned.sorted_token_ids], expert_of[blocks.sorted_token_ids])
        assert torch.equal(aligned.sorted_token_ids.sort().values, blocks.sorted_token_ids.sort().values)


@pytest.mark.slow
def test_prologue_routes_many_choices_by_clusters():
    topk_ids = (torch.rand(4000, 9, generator=torch.Generator().manual_seed(0)) ** 4 * 257).int()
    with emulated(num_sms=6, seed=1):
        tiled = sm90_prologue.empty_tiles(topk_ids.numel(), 257, 64, CPU)
        sm90_prologue.launch(topk_ids=topk_ids, num_experts=257, aligned=tiled)
    expected = tile_rows(topk_ids, 64, 257)
    assert torch.equal(tiled.tiles, expected.tiles)
    experts = topk_ids.flatten()
    assert torch.equal(experts[tiled.sorted_choices], experts[expected.sorted_choices])


# ---- sm90_order


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "dropped"),
    [(1, 9, 0.0), (40, 1000, 0.3), (300, 40, 1.0), pytest.param(3000, 257, 0.2, marks=pytest.mark.slow)],
)
def test_choices_come_in_the_order_of_their_experts(num_tokens, num_experts, dropped):
    generator = torch.Generator().manual_seed(0)
    topk_ids = (torch.rand(num_tokens, 9, generator=generator) ** 2 * num_experts).int()
    topk_ids[torch.rand(topk_ids.shape, generator=generator) < dropped] = -1
    experts = topk_ids.flatten()
    for seed in SEEDS[:2]:
        with emulated(num_sms=8, seed=seed):
            launch = sm90_order.bind(CPU, experts.numel(), num_experts)
            parts = {name: torch.full((size // 4,), -7).int() for name, size in sm90_order.parts(len(experts)).items()}
            for name, part in parts.items():
                setattr(launch.params, name, part.data_ptr())
            launch.params.topk_ids = topk_ids.data_ptr()
            launch.enqueue(0)
        here = experts[experts >= 0]
        assert torch.equal(parts["expert_choices"], here.bincount(minlength=sm90_order.MAX_EXPERTS).int())
        num_rows = len(here)
        choices = parts["sorted_choices"][:num_rows]
        assert torch.equal(experts[choices], here.sort().values)
        assert len(choices.unique()) == num_rows


# ---- the emulation itself


def holds_ptx(path: Path) -> bool:
    """Whether there is inline assembly other than an empty one, which only holds the compiler back."""
    return re.search(r'\basm\b[^(]*\(\s*"[^"]', path.read_text()) is not None


def test_the_headers_that_hold_ptx_are_the_ones_emulated():
    with_ptx = {path.name for path in cuda_compile.INCLUDE_FOLDER.glob("*.cuh") if holds_ptx(path)}
    assert with_ptx == {path.name for path in (emulator.FOLDER / "include").glob("*.cuh")}


@pytest.mark.parametrize("path", sorted(cuda_compile.SOURCE_FOLDER.glob("*.cu")), ids=lambda path: path.stem)
def test_kernels_themselves_hold_no_ptx(path: Path):
    assert not holds_ptx(path)


class RingParams(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("a", "b", "sum", "num_tiles"))


def ring(fault: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the ring of emulation/ring.cu adds up, and what it should."""
    num_tiles = 7
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-8, 9, (num_tiles + 1, 64, 128), generator=generator).to(torch.float8_e4m3fn)
    b = torch.randint(-8, 9, (8, num_tiles, 128), generator=generator).to(torch.float8_e4m3fn)
    rows_of_128 = torch.cat([a, a], dim=1).view(torch.uint8)  # a tile of weight_tiles.py is twice as high
    swizzled = weight_tiles.swizzled(rows_of_128)[:, :64].contiguous()
    total = torch.full((64, 8), torch.nan)
    params = RingParams(swizzled.data_ptr(), b.data_ptr(), total.data_ptr(), num_tiles)
    kernel = emulate(emulator.FOLDER / "ring.cu", {"FAULT": fault})
    kernel(params, Grid(num_ctas=1, num_threads=192, cluster_size=1, seed=seed))
    return total, torch.einsum("trk,ntk->rn", a[:num_tiles].float(), b.float())


RELEASES_EARLY, SKIPS_WAIT, EXPECTS_TOO_FEW, EXPECTS_TOO_MANY, SKIPS_FENCE, LOADS_ONE_MORE, RELEASES_TWICE = range(1, 8)


def test_a_sound_ring_is_exact_under_any_interleaving():
    for seed in range(20):
        total, expected = ring(fault=0, seed=seed)
        assert torch.equal(total, expected)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (RELEASES_EARLY, r"ring\.cu:\d+: operands changed while the product was in flight"),
        (SKIPS_WAIT, r"ring\.cu:\d+: operands changed while the product was in flight"),
        (EXPECTS_TOO_FEW, r"ring\.cu:\d+: more bytes land than the barrier was told to expect"),
        (
            EXPECTS_TOO_MANY,
            r"CTA 0: threads 0-127 wait at ring\.cu:\d+ for an mbarrier .* misses 0 of 33 .* and 16 bytes",
        ),
        (SKIPS_FENCE, r"ring\.cu:\d+: reads what cp\.async wrote, without fence_async_proxy\(\) since"),
        (LOADS_ONE_MORE, r"a bulk copy: reaches the shared memory of CTA 0, which has ended"),
        (RELEASES_TWICE, r"ring\.cu:\d+: operands changed while the product was in flight"),
    ],
    ids=(
        "releases early",
        "skips wait",
        "too few bytes",
        "too many bytes",
        "skips fence",
        "one load more",
        "releases twice",
    ),
)
def test_a_planted_fault_is_found(fault, message):
    found = []
    for seed in range(32):
        try:
            ring(fault, seed)
        except EmulationError as fault_found:
            found.append(str(fault_found))
    assert any(re.search(message, text) for text in found), found


class HandoverParams(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64), ("neighbour", ctypes.c_uint64))


def handover(fault: int, seed: int) -> torch.Tensor:
    words, neighbour = torch.full((4,), -1, dtype=torch.int32), torch.zeros(4, 2)
    kernel = emulate(emulator.FOLDER / "handover.cu", {"FAULT": fault})
    params = HandoverParams(words.data_ptr(), neighbour.data_ptr())
    kernel(params, Grid(num_ctas=4, num_threads=64, cluster_size=2, seed=seed))
    return neighbour


NEVER_STORES, LEAVES_EARLY = 1, 2


def test_values_are_handed_from_cta_to_cta():
    for seed in range(8):
        assert handover(fault=0, seed=seed).tolist() == [[1, 101], [2, 100], [3, 103], [0, 102]]


def test_a_value_that_never_comes_is_a_deadlock_that_names_the_line():
    with pytest.raises(EmulationError, match=r"CTA 3: threads 0 wait at handover\.cu:\d+ for a value in memory"):
        handover(NEVER_STORES, seed=0)


def test_a_cta_that_leaves_before_its_neighbour_has_read_is_found():
    def leave_early_in_many_ways() -> None:
        for seed in range(32):
            handover(LEAVES_EARLY, seed)

    with pytest.raises(EmulationError, match="reads the shared memory of a CTA that has ended"):
        leave_early_in_many_ways()


class AffineParams(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64), ("factor", ctypes.c_float), ("addend", ctypes.c_float))


@pytest.mark.parametrize(("fault", "expected"), [(0, 1 * 2 + 3), (1, (1 + 3) * 2)])
def test_an_overlapping_kernel_is_ahead_of_the_one_before_until_it_waits(fault, expected):
    words = torch.ones(64)
    gpu = Device(num_sms=2, seed=0)
    file, defines = emulator.FOLDER / "affine.cu", {"FAULT": fault}
    kernel = Kernel(gpu, Source(file, tuple(defines.items())), emulate(file, defines), 32, 1, 0, 2)
    for factor, addend in ((2, 0), (1, 3)):
        kernel.bind(AffineParams(words.data_ptr(), factor, addend), num_ctas=2, overlap_previous=True).enqueue(0)
    gpu.synchronize()
    assert words.tolist() == [expected] * 64
