"""vLLM's plugin against a stand-in of vLLM: which layers and calls are left to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import fake_vllm
from engines.driven import OURS, VLLM, Gather, added, batch, not_served_with, nothing_kept, record, weights


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    yield from nothing_kept(monkeypatch, tmp_path)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Gather:
    return added(Gather(), monkeypatch)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer.activation": fake_vllm.MoEActivation.GELU}, "activation: expected silu, got gelu"),
        ({"layer.swiglu_limit": 7.0}, "activation: expected SwiGLU without limit, alpha and beta"),
        ({"layer.apply_router_weight_on_input": True}, "apply_router_weight_on_input: expected False"),
        ({"config.has_bias": True}, "bias: expected none"),
        ({"config.is_lora_enabled": True}, "LoRA: expected none"),
        ({"config.in_dtype": torch.float16}, "in_dtype: expected bfloat16, got torch.float16"),
        (
            {"config.moe_parallel_config": fake_vllm.parallel_config(use_all2all_kernels=True)},
            "parallelism: expected no all-to-all, the tokens being on the rank already",
        ),
        (
            {"method.fp8_backend": fake_vllm.Fp8MoeBackend.FLASHINFER_CUTLASS},
            "backend: expected TRITON, which keeps the weights as they are served, got FLASHINFER_CUTLASS",
        ),
    ],
)
def test_what_vllm_asks_of_a_layer_beyond_ours_is_left_to_it(
    changes: dict[str, Any],
    reason: str,
    ours: Gather,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    not_served_with(VLLM(monkeypatch), changes, reason, tmp_path, caplog)


def test_vllm_runs_shared_experts_that_its_kernel_overlaps(
    ours: Gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, (OURS, 10.0))
    engine = VLLM(monkeypatch)
    engine.register()
    engine.build(weights())
    engine.loaded()
    inputs = batch()
    engine.module.forward_modular(inputs.tokens, inputs.topk_weights, inputs.topk_ids, shared_experts=object())
    assert engine.num_own_calls == 1
