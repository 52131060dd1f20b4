"""Compiling ahead leaves in the caches what a sweep then runs, and a failure there stops nothing."""

from __future__ import annotations

import pytest

from kernels_cuda import compile as cuda_compile
from kernels_cuda.sm90_fused import SM90Fused
from workbench.models import shape_of_alias
from workbench.precompile import Request, precompile
from workbench.variant import Config

SHAPE = shape_of_alias("tiny")
CONFIG = Config(block_m=8, cluster_size=1, num_stages=3)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_WORKBENCH_CACHE", str(tmp_path))
    return tmp_path


def test_what_was_compiled_ahead_is_not_compiled_again(fresh_cache, monkeypatch):
    request = Request("cuda.sm90_fused", SHAPE, CONFIG)
    precompile([request, request])
    assert len(list(fresh_cache.glob("sm90_fused-*.cubin"))) == 1
    monkeypatch.setattr(cuda_compile, "_run_compiler", lambda *_: pytest.fail("compiled again"))
    assert SM90Fused().compile(SHAPE, [CONFIG])[1].clean


def test_a_config_that_does_not_compile_is_passed_over(fresh_cache):
    broken = Request("cuda.sm90_fused", SHAPE, Config(block_m=12, cluster_size=1, num_stages=3))
    precompile([broken, Request("cuda.sm90_fused", SHAPE, CONFIG)])
    assert len(list(fresh_cache.glob("sm90_fused-*.cubin"))) == 1


def test_nothing_to_compile_starts_no_process(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started a process"))
    precompile([])
