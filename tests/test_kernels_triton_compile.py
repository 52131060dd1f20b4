"""Triton kernels compiled for sm_90a without a GPU: no spills, the fp8 tensor cores, and shared memory that fits."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")
from kernels_triton.compile import CompiledLaunch, compiled_launches
from kernels_triton.grouped import TritonGrouped, without_storage
from workbench.errors import CompileError
from workbench.models import shape_of_alias
from workbench.variant import Config

SHARED_BYTES_OF_A_BLOCK = 227 * 1024
PRODUCTS = ("grouped_gemm_kernel", "up_swiglu_kernel")
NUM_TOKENS = [1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
VARIANT = TritonGrouped()


def defaults(alias: str) -> Iterator[Config]:
    shape = shape_of_alias(alias)
    yield from dict.fromkeys(next(iter(VARIANT.configs(shape, num_tokens))) for num_tokens in NUM_TOKENS)


def launches_of(alias: str, config: Config) -> list[CompiledLaunch]:
    weights, inputs = without_storage(shape_of_alias(alias))
    with compiled_launches() as launches:
        VARIANT.run(weights, inputs, torch.empty_like(inputs.tokens), config)
    return launches


CASES = [(alias, config) for alias in ("dsv3_tp16", "dsv3_tp8", "qwen3next_tp4") for config in defaults(alias)]


@pytest.mark.parametrize(("alias", "config"), CASES, ids=lambda value: str(value))
def test_defaults_compile_cleanly(alias: str, config: Config) -> None:
    launches = launches_of(alias, config)
    names = [launch.kernel for launch in launches]
    assert names[:2] == ["place_kernel", "quantise_kernel"]
    assert names[-2:] == ["grouped_gemm_kernel", "combine_kernel"]
    for launch in launches:
        assert (launch.spill_bytes, launch.stack_bytes, launch.warnings) == (0, 0, ()), launch.kernel
        assert launch.registers <= 255
        assert launch.shared_bytes <= SHARED_BYTES_OF_A_BLOCK
        opcodes = set(re.findall(r"\b(QGMMA|HMMA|ACQBULK|PREEXIT)\b", launch.sass()))
        # Each waits for its predecessor and lets its successor start; products run on the fp8 tensor cores.
        assert opcodes == {"ACQBULK", "PREEXIT", *(["QGMMA"] if launch.kernel in PRODUCTS else [])}, launch.kernel


def test_short_blocks_need_swapped_operands() -> None:
    """Why `swap` is there: without it Triton 3.6 unpacks fp8 to fp16."""
    config = Config(**{**next(defaults("dsv3_tp16")), "swap": False})
    products = [launch for launch in launches_of("dsv3_tp16", config) if launch.kernel in PRODUCTS]
    assert all("HMMA" in launch.sass() and "QGMMA" not in launch.sass() for launch in products)


def test_compile_reports_each_kernel_of_a_configuration() -> None:
    config = next(defaults("dsv3_tp16"))
    reports = VARIANT.compile(shape_of_alias("dsv3_tp16"), [config])
    assert [report.kernel for report in reports] == [
        "place_kernel",
        "quantise_kernel",
        "grouped_gemm_kernel",
        "swiglu_kernel",
        "grouped_gemm_kernel",
        "combine_kernel",
    ]
    assert all(report.clean and report.config == config for report in reports)
    assert all(16 <= report.registers <= 255 for report in reports)
    assert reports[2].dynamic_smem_bytes > 4 * 128 * (128 + 16)  # four stages of weights and tokens


def test_what_cannot_compile_is_a_compile_error() -> None:
    config = Config(**{**next(defaults("dsv3_tp16")), "block_m": 24})
    with pytest.raises(CompileError, match="power of 2"):
        VARIANT.compile(shape_of_alias("dsv3_tp16"), [config])


def test_the_driver_is_itself_again_afterwards() -> None:
    import triton

    before = triton.runtime.driver._active, triton.knobs.runtime.jit_cache_hook
    launches_of("dsv3_tp16", next(defaults("dsv3_tp16")))
    assert (triton.runtime.driver._active, triton.knobs.runtime.jit_cache_hook) == before
