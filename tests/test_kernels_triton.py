"""kernels_triton: the kernels in the repaired interpreter, what the variant supports, and its tuning space."""

from __future__ import annotations

import pytest
import torch
from interpreted_child import assert_passes_interpreted

pytest.importorskip("triton")
from kernels_triton.grouped import TritonGrouped
from workbench.models import shape_of_alias
from workbench.problem import MoEShape

CPU = torch.device("cpu")
REAL_SHAPES = ["dsv3_tp16", "dsv3_tp8", "qwen3next_tp4"]
NUM_TOKENS = [0, 1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


@pytest.mark.parametrize("file_name", ["test_steps.py", "test_grouped.py"])
def test_in_the_repaired_interpreter(file_name: str) -> None:
    assert_passes_interpreted(file_name)


def test_supports_says_what_does_not_fit() -> None:
    variant = TritonGrouped()
    assert variant.supports(MoEShape(8, 192, 128, 2), CPU).reason == (
        "hidden_size: expected a multiple of 128, got 192"
    )
    assert variant.supports(MoEShape(8, 256, 96, 2), CPU).reason == (
        "intermediate_size: expected a multiple of 128, got 96"
    )
    assert variant.supports(MoEShape(8, 256, 128, 2), CPU).reason == "Triton needs a GPU or TRITON_INTERPRET=1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_supports_never_raises_without_a_driver() -> None:
    assert "GPU" in TritonGrouped().supports(MoEShape(8, 256, 128, 2), torch.device("cuda")).reason


@pytest.mark.parametrize("alias", REAL_SHAPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_tuning_space_is_small_and_has_no_duplicates(alias: str, num_tokens: int) -> None:
    configs = list(TritonGrouped().configs(shape_of_alias(alias), num_tokens))
    assert 1 <= len(configs) <= 16
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize("alias", REAL_SHAPES)
def test_default_splits_k_only_where_few_experts_are_hit(alias: str) -> None:
    shape, variant = shape_of_alias(alias), TritonGrouped()
    splits = [next(iter(variant.configs(shape, num_tokens))).integer("split_k") for num_tokens in NUM_TOKENS[1:]]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] > 8
    assert splits[-1] == 1


def test_sources_hold_every_kernel() -> None:
    names = {path.name for path in TritonGrouped().sources()}
    assert {"align.py", "combine.py", "grouped.py", "grouped_gemm.py", "ptx.py", "quantise.py", "swiglu.py"} <= names
