"""cuda.sm90_stream and its forms without a GPU: what the compiler makes of them, and what the launcher offers and
refuses."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from emulation.emulator import RESERVED_SMEM_BYTES, SMEM_BYTES_PER_SM

from kernels_cuda import compile as cuda_compile
from kernels_cuda import sm90_fill, sm90_prologue, sm90_stream, workspace
from kernels_cuda.compile import Cubin
from kernels_cuda.sm90 import NUM_SMS, SMEM_BYTES
from kernels_cuda.sm90_stream import (
    FLAG_BYTES,
    FLAGGED_PARTS,
    FORMS,
    MAX_ROWS,
    MAX_STAGES,
    SM90Stream,
    SM90StreamInPlace,
    _InPlaceParams,
    _Params,
    default_max_parts,
    default_max_rows,
    exchange,
    max_rows_that_fit,
    most_buffers,
    most_stages,
    smem_bytes,
    taken,
)
from kernels_triton.compile import disassemble
from workbench.errors import CompileError, InputError
from workbench.generate import make_weights
from workbench.models import shape_of_alias
from workbench.problem import MoEShape
from workbench.variant import Config

DSV3_TP16 = shape_of_alias("dsv3_tp16")
DSV3_TP8 = shape_of_alias("dsv3_tp8")
SHAPES = [DSV3_TP16, DSV3_TP8, *(shape_of_alias(alias) for alias in ("qwen3next_tp4", "tiny", "tiny_shared"))]
WIDE = MoEShape(8, 4096, 3584, 2)
MOST_CODE_BYTES = 72 * 1024
TOKENS = (0, 1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 131072)


def compiled_cases() -> list[tuple[MoEShape, Config]]:
    """Every height, number of parts and depth offered, each on the shape with least and with most chunks it fits."""
    cases = {}
    for shape in (*SHAPES[:3], WIDE):
        for tokens in TOKENS:
            for config in SM90Stream().configs(shape, tokens):
                cases.setdefault((shape.intermediate_size, config), shape)
    return [(shape, config) for (_, config), shape in cases.items()]


@pytest.mark.parametrize(("shape", "config"), compiled_cases(), ids=str)
def test_every_offered_config_compiles_without_spills_or_warnings(shape, config):
    reports = SM90Stream().compile(shape, [config])[-len(FORMS) :]
    for report in reports:
        assert report.kernel == "sm90_stream"
        assert report.clean, report
        assert report.static_smem_bytes + report.dynamic_smem_bytes <= SMEM_BYTES


@pytest.mark.parametrize("num_tokens", [1, 256, 2048])
def test_in_place_it_compiles_without_spills_or_warnings_either(num_tokens):
    config = next(iter(SM90StreamInPlace().configs(DSV3_TP16, num_tokens)))
    for report in SM90StreamInPlace().compile(DSV3_TP16, [config])[-len(FORMS) :]:
        assert report.kernel == "sm90_stream"
        assert report.clean, report


@pytest.mark.parametrize("first", [sm90_fill.compiled, lambda: sm90_prologue.compiled(groups=False)])
def test_with_short_tiles_a_cta_leaves_room_for_one_of_the_kernel_before(first):
    before = first().report(Config(), 0)
    config = next(iter(SM90Stream().configs(DSV3_TP16, 1)))
    stream = SM90Stream().compile(DSV3_TP16, [config])[-1]
    assert before.clean
    assert 512 * before.registers + 384 * stream.registers <= 65536
    assert before.static_smem_bytes == 0
    assert stream.dynamic_smem_bytes + 2 * RESERVED_SMEM_BYTES <= SMEM_BYTES_PER_SM


@pytest.mark.parametrize("alias", ["dsv3_tp16", "dsv3_tp8", "qwen3next_tp4"])
@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_kernels_of_small_batches_have_less_code_than_costs_time(alias, num_tokens):
    """experiments/2026-11-28_code_size."""
    shape = shape_of_alias(alias)
    config = next(iter(SM90Stream().configs(shape, num_tokens)))
    for takes in FORMS:
        cubin, _ = sm90_stream._compile(config, shape, NUM_SMS, False, takes)
        assert code_bytes(cubin) <= MOST_CODE_BYTES


def code_bytes(cubin: Cubin) -> int:
    """Of 16 for each instruction."""
    return 16 * len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", disassemble(cubin.path), re.MULTILINE))


def test_ctas_list_tiles_and_order_choices_where_there_is_room():
    def takes(shape, num_tokens, **changes):
        config = Config(**{**next(iter(SM90Stream().configs(shape, num_tokens))), **changes})
        return taken(shape, num_tokens, config)

    assert all(takes(shape, 64) == "ids" for shape in SHAPES)
    assert takes(DSV3_TP16, 156) == "ids"
    assert takes(DSV3_TP16, 157) == "choices"  # 1413 choices: more than four for each thread
    assert takes(MoEShape(1000, 512, 256, 16), 64) == "choices"  # choices do not fit the table beside the tiles
    assert takes(MoEShape(1024, 512, 256, 64), 64) == "tiles"  # nor tiles alone
    assert takes(shape_of_alias("qwen3next_tp4"), 2048) == "choices"
    assert takes(DSV3_TP16, 8192) == "tiles"  # more choices than one launch puts in order
    assert takes(DSV3_TP16, 1, num_in_flight=6) == "choices"  # the last stage is not free meanwhile


@pytest.mark.parametrize("shape", [*SHAPES, WIDE], ids=str)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_configs_start_with_the_default_and_all_fit(shape, num_tokens):
    configs = list(SM90Stream().configs(shape, num_tokens))
    assert configs[0]["max_rows"] == default_max_rows(shape, num_tokens)
    assert len(set(configs)) == len(configs)
    for config in configs:
        max_rows, num_stages = config.integer("max_rows"), config.integer("num_stages")
        assert max_rows in MAX_ROWS
        assert 4 <= num_stages <= MAX_STAGES
        assert 1 <= config.integer("num_in_flight") <= num_stages
        assert config.integer("max_parts") >= 4
        assert smem_bytes(shape, max_rows, num_stages) <= SMEM_BYTES


def test_tiles_grow_with_the_rows_of_an_expert():
    heights = [default_max_rows(DSV3_TP16, tokens) for tokens in TOKENS]
    assert heights == sorted(heights)
    assert (heights[1], heights[-1]) == (8, 96)


def test_tiles_are_taller_where_experts_are_large_and_many():
    large, small, few = DSV3_TP8, shape_of_alias("qwen3next_tp4"), MoEShape(8, 7168, 256, 2)
    assert [default_max_rows(large, tokens) for tokens in (16, 64, 256, 512, 1024)] == [8, 16, 48, 64, 64]
    assert [default_max_rows(DSV3_TP16, tokens) for tokens in (16, 64, 256, 512)] == [8, 16, 32, 48]
    assert [default_max_rows(small, tokens) for tokens in (64, 256, 512, 1024)] == [8, 32, 48, 64]
    assert [default_max_rows(few, tokens) for tokens in (16, 32, 64)] == [8, 16, 24]


def test_the_tallest_tiles_hold_experts_of_as_many_rows_whatever_the_skew():
    qwen = shape_of_alias("qwen3next_tp4")
    assert [default_max_rows(qwen, tokens) for tokens in (1024, 2048, 3000, 4096)] == [64, 64, 80, 96]
    assert [default_max_rows(DSV3_TP16, tokens) for tokens in (1024, 1700, 2048, 4096)] == [64, 80, 80, 96]
    assert default_max_rows(DSV3_TP8, 4096) == 80  # taller ones leave no room for four stages


def test_sums_are_flagged_where_there_are_many_rows_or_tiles():
    qwen = shape_of_alias("qwen3next_tp4")
    assert [default_max_parts(DSV3_TP16, tokens) for tokens in (1, 4, 8, 32, 64, 1024)] == [16, 16, 8, 8, 4, 4]
    assert [default_max_parts(qwen, tokens) for tokens in (4, 16, 32, 64)] == [16, 8, 4, 4]
    assert [default_max_parts(WIDE, tokens) for tokens in (4, 64, 256)] == [16, 8, 4]


def test_tall_tiles_have_fewer_stages_of_tokens_and_so_as_many_of_weights():
    assert [most_stages(DSV3_TP16, rows) for rows in MAX_ROWS] == [6, 6, 5, 5, 5, 4, 4, 4]


def test_there_is_a_third_buffer_of_activations_where_it_takes_no_stage():
    assert [most_buffers(DSV3_TP16, rows, most_stages(DSV3_TP16, rows)) for rows in MAX_ROWS[:7]] == [3] * 7
    assert most_buffers(DSV3_TP16, 96, most_stages(DSV3_TP16, 96)) == 2
    assert [most_buffers(DSV3_TP8, rows, most_stages(DSV3_TP8, rows)) for rows in MAX_ROWS[:6]] == [3, 3, 3, 3, 2, 2]
    assert most_buffers(WIDE, 8, most_stages(WIDE, 8)) == 2
    for shape in (*SHAPES, WIDE):
        for rows in max_rows_that_fit(shape):
            stages = most_stages(shape, rows)
            assert smem_bytes(shape, rows, stages, most_buffers(shape, rows, stages)) <= SMEM_BYTES


def test_wide_layers_get_shorter_tiles():
    assert max_rows_that_fit(DSV3_TP16) == list(MAX_ROWS)
    assert max_rows_that_fit(WIDE) == [8]
    assert most_stages(DSV3_TP16, 8) == MAX_STAGES


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (MoEShape(8, 200, 128, 2), "hidden_size must be a multiple of 128, got 200"),
        (MoEShape(8, 256, 128, 2, has_bias=True), "has_bias: expected False, got True"),
        (MoEShape(8, 256, 128, 2, weight_scales="channel"), "weight_scales: expected 'block', got 'channel'"),
        (MoEShape(2048, 256, 128, 2), "at most 1024 experts, got 2048"),
        (MoEShape(8, 256, 14336, 2), "the activations of 8 rows of 14336 channels do not fit an SM"),
    ],
)
def test_a_shape_it_cannot_serve_is_refused_with_the_reason(shape, reason):
    support = SM90Stream().supports_shape(shape)
    assert not support
    assert support.reason == reason


def test_every_intermediate_size_and_the_forms_of_the_activation_are_served():
    assert SM90Stream().supports_shape(MoEShape(8, 256, 192, 2))
    assert SM90Stream().supports_shape(
        MoEShape(8, 256, 128, 2, swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_beta=1.0, activation_scales="group_ue8m0")
    )


def test_in_place_the_rows_of_w2_are_such_as_the_copy_engine_reads():
    support = SM90StreamInPlace().supports_shape(MoEShape(8, 256, 200, 2))
    assert not support
    assert support.reason == "intermediate_size must be a multiple of 16, got 200"
    assert SM90StreamInPlace().supports_shape(MoEShape(8, 256, 176, 2))
    assert SM90Stream().supports_shape(MoEShape(8, 256, 200, 2))


@pytest.mark.parametrize("name", ["w13", "w2"])
def test_in_place_weights_must_lie_where_the_copy_engine_reads(name):
    weights = make_weights(MoEShape(2, 128, 16, 1), seed=0, device=torch.device("cpu"))
    served = getattr(weights, name)
    memory = torch.empty(served.numel() + 8, dtype=served.dtype)
    moved = dataclasses.replace(weights, **{name: memory[8:].view(served.shape)})
    with pytest.raises(InputError, match=rf"^{name}: expected an address that is a multiple of 16, got 0x[0-9a-f]+8$"):
        SM90StreamInPlace().prepare(moved)


def test_a_machine_without_a_gpu_compiles_only():
    support = SM90Stream().supports(DSV3_TP16, torch.device("cpu"))
    assert not support
    assert "compiled only" in support.reason


@pytest.mark.parametrize("max_parts", [FLAGGED_PARTS, 8])
def test_the_exchange_has_room_for_every_part_and_is_whole_vectors(max_parts):
    marked, others = exchange(num_choices=15, num_experts=8, num_chunks=2, max_rows=8, max_parts=max_parts)
    sizes = {**marked, **others}
    assert sizes["sums"] == 15 * 2 * max_parts * 1024
    assert sizes["activations"] == 15 * 256
    assert sizes["activation_scales"] >= 15 * 2 * 4
    assert all(size % 16 == 0 for size in sizes.values())
    flagged = max_parts == FLAGGED_PARTS
    assert sizes["sums_written"] == (9 * 2 * FLAG_BYTES if flagged else 0)  # 9 tiles at most: 8 experts and a full one
    assert list(others) == (["sums"] if flagged else [])
    for params in (_Params, _InPlaceParams):
        assert set(sizes) <= {name for name, *_ in params._fields_}


def test_parts_of_a_workspace_lie_behind_each_other_the_filled_ones_first_and_the_others_on_lines_of_their_own():
    parts = workspace.layout({"a": 32, "none": 0, "b": 16}, {"c": 132, "d": 4})
    assert parts.offsets == {"filled": 0, "a": 0, "none": 32, "b": 32, "c": 128, "d": 384}
    assert (parts.num_filled_bytes, parts.num_bytes) == (48, 512)
    assert workspace.layout({}, {"c": 4}).offsets["c"] == 0
    assert workspace.allocate(parts, torch.device("cpu")).nbytes == 512


def test_too_little_shared_memory_does_not_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_WORKBENCH_CACHE", str(tmp_path))
    defines = {
        "MAX_ROWS": 8,
        "HIDDEN_SIZE": 256,
        "NUM_CHUNKS": 1,
        "MAX_PARTS": 4,
        "NUM_STAGES": 6,
        "NUM_IN_FLIGHT": 3,
        "NUM_CTAS": 132,
        "DETERMINISTIC": 0,
        "SMEM_BYTES": 4096,
        "PARAMS_BYTES": 128,
    }
    with pytest.raises(CompileError, match="the launcher reserves too little shared memory"):
        cuda_compile.compile_kernel("sm90_stream", defines)


def test_sources_are_all_files_that_decide_what_runs():
    paths = SM90Stream().sources()
    names = {path.name for path in paths}
    assert {
        "sm90_stream.cu",
        "stream_math.cuh",
        "sm90_prologue.cu",
        "sm90_fill.cu",
        "sm90_order.cu",
        "weight_tiles.py",
        "launch.py",
    } <= names
    assert all(path.is_file() for path in paths)


def test_the_form_in_place_depends_on_tensor_maps_and_not_on_tiles():
    names, in_place = ({path.name for path in variant.sources()} for variant in (SM90Stream(), SM90StreamInPlace()))
    assert names - in_place == {"weight_tiles.py"}
    assert in_place - names == {"tma.py"}
