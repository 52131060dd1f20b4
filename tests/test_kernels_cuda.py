"""The CUDA kernels without a GPU: what the compiler makes of them, and what the launcher offers and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels_cuda import compile as cuda_compile
from kernels_cuda import sm90_fill, sm90_order, sm90_prologue
from kernels_cuda.sm90 import SMEM_BYTES
from kernels_cuda.sm90_fused import (
    BLOCKS,
    CLUSTERS,
    MAX_STAGES,
    SM90Fused,
    default_block_m,
    default_cluster_size,
    most_stages,
    smem_bytes,
)
from workbench.errors import CompileError
from workbench.models import ALIASES, shape_of_alias
from workbench.problem import MoEShape
from workbench.variant import Config

SHAPES = [shape_of_alias(alias) for alias in ("dsv3_tp16", "dsv3_tp8", "qwen3next_tp4", "tiny", "tiny_shared")]
TOKENS = (0, 1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 131072)
EVERY_CONFIG = sorted(
    {config for shape in SHAPES for tokens in TOKENS for config in SM90Fused().configs(shape, tokens)}
    | {Config(block_m=block, cluster_size=1, num_stages=most_stages(block, 1)) for block in range(8, 129, 8)},
    key=str,
)


@pytest.mark.parametrize("config", EVERY_CONFIG, ids=str)
def test_every_offered_config_compiles_without_spills_or_warnings(config):
    report = SM90Fused().compile(SHAPES[0], [config])[1]
    assert report.warnings == ()
    assert (report.spill_bytes, report.stack_bytes) == (0, 0)
    assert report.registers <= 65536 // 384
    assert report.static_smem_bytes + report.dynamic_smem_bytes <= SMEM_BYTES


def test_the_launch_that_orders_choices_compiles_without_spills_or_warnings():
    assert all(cubin.report(Config(), 0).clean for cubin in sm90_order.compiled_forms())


@pytest.mark.parametrize("groups", [True, False])
def test_the_prologue_compiles_without_spills_or_warnings(groups):
    report = sm90_prologue.compiled(groups).report(Config(), 0)
    assert report.clean
    assert report.registers <= 65536 // sm90_prologue.NUM_THREADS
    assert report.static_smem_bytes <= 48 * 1024


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_configs_start_with_the_default_and_all_fit(shape, num_tokens):
    configs = list(SM90Fused().configs(shape, num_tokens))
    block_m = default_block_m(shape, num_tokens)
    assert configs[0]["block_m"] == block_m
    assert configs[0]["cluster_size"] == default_cluster_size(shape, num_tokens, block_m)
    assert len(set(configs)) == len(configs)
    for config in configs:
        block, cluster, stages = (config.integer(name) for name in ("block_m", "cluster_size", "num_stages"))
        assert block in BLOCKS
        assert cluster in CLUSTERS
        assert 3 <= stages <= MAX_STAGES
        assert smem_bytes(block, cluster, stages) <= SMEM_BYTES
        assert cluster <= shape.hidden_size // 128


def test_few_tokens_spread_over_clusters_and_many_do_not():
    shape = shape_of_alias("dsv3_tp16")
    assert default_cluster_size(shape, 1, 8) == 8
    assert default_cluster_size(shape, 2, 8) == 4
    assert default_cluster_size(shape, 8, 8) == 2
    assert default_cluster_size(shape, 256, 16) == 1


def test_blocks_grow_with_the_rows_of_an_expert():
    shape = shape_of_alias("dsv3_tp16")
    blocks = [default_block_m(shape, tokens) for tokens in TOKENS]
    assert blocks == sorted(blocks)
    assert (blocks[1], blocks[-1]) == (8, 128)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (MoEShape(8, 200, 128, 2), "hidden_size must be a multiple of 128, got 200"),
        (MoEShape(8, 256, 192, 2), "intermediate_size must be a multiple of 128, got 192"),
        (MoEShape(8, 256, 128, 2, has_bias=True), "has_bias: expected False, got True"),
        (MoEShape(2048, 256, 128, 2), "at most 1024 experts, got 2048"),
    ],
)
def test_a_shape_it_cannot_serve_is_refused_with_the_reason(shape, reason):
    support = SM90Fused().supports_shape(shape)
    assert not support
    assert support.reason == reason


def test_a_machine_without_a_gpu_compiles_only():
    support = SM90Fused().supports(SHAPES[0], torch.device("cpu"))
    assert not support
    assert "compiled only" in support.reason


def test_sources_are_all_files_that_decide_what_runs():
    names = {path.name for path in SM90Fused().sources()}
    assert {"sm90_fused.cu", "sm90_fused.py", "sm90_prologue.cu", "sm90_prologue.py", "wgmma.cuh", "launch.py"} <= names
    assert all(path.is_file() for path in SM90Fused().sources())
    assert len(ALIASES) >= len(SHAPES)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_WORKBENCH_CACHE", str(tmp_path))
    return tmp_path


def test_what_is_in_the_cache_is_not_compiled_again(fresh_cache, monkeypatch):
    first = sm90_prologue.compiled(groups=True)
    cuda_compile._compile.cache_clear()
    monkeypatch.setattr(cuda_compile, "_run_compiler", lambda *_: pytest.fail("compiled again"))
    assert sm90_prologue.compiled(groups=True) == first
    assert first.path.parent == fresh_cache
    assert first.path.read_bytes()[:4] == b"\x7fELF"
    assert sorted(path.suffix for path in fresh_cache.iterdir()) == [".cubin", ".log"]


def test_another_define_is_another_file(fresh_cache):
    config = Config(block_m=8, cluster_size=1, num_stages=6)
    SM90Fused().compile(SHAPES[0], [config, Config(block_m=8, cluster_size=1, num_stages=5)])
    assert len(list(fresh_cache.glob("sm90_fused-*.cubin"))) == 2


def test_source_that_does_not_compile_raises_the_compilers_words(fresh_cache):
    with pytest.raises(CompileError, match="the launcher's struct differs"):
        cuda_compile.compile_kernel(sm90_prologue.KERNEL, {"PARAMS_BYTES": 1})
    assert list(fresh_cache.iterdir()) == []


def test_too_little_shared_memory_does_not_compile(fresh_cache):
    defines = {"BLOCK_M": 8, "CLUSTER_SIZE": 1, "NUM_STAGES": 6, "SMEM_BYTES": 4096, "PARAMS_BYTES": 384}
    with pytest.raises(CompileError, match="the launcher reserves too little shared memory"):
        cuda_compile.compile_kernel("sm90_fused", defines)


def test_kernels_are_built_anew_for_racecheck(fresh_cache, monkeypatch):
    defines = {"PARAMS_BYTES": 32}
    usual = cuda_compile.compile_kernel(sm90_fill.KERNEL, defines)
    monkeypatch.setenv("MOE_WORKBENCH_RACECHECK", "1")
    assert cuda_compile.compile_kernel(sm90_fill.KERNEL, defines).path != usual.path


def test_a_report_needs_the_assemblers_figures():
    with pytest.raises(CompileError, match="no resource usage"):
        cuda_compile.Cubin(Path("x.cubin"), "kernel", "nothing here").report(Config(), 0)


def test_a_report_carries_the_warnings():
    log = (
        "ptxas warning : Potential Performance Loss: wgmma.mma_async instructions are serialized (C7511)\n"
        "    8 bytes stack frame, 16 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 2 barriers, 12420 bytes smem"
    )
    report = cuda_compile.Cubin(Path("x.cubin"), "kernel", log).report(Config(), 5)
    assert not report.clean
    assert (report.registers, report.spill_bytes, report.stack_bytes) == (168, 20, 8)
    assert (report.static_smem_bytes, report.dynamic_smem_bytes) == (12420, 5)
    assert len(report.warnings) == 1
