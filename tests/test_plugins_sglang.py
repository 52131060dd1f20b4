"""SGLang's plugin against a stand-in of SGLang: which layers and calls are left to it, and what else it reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import fake_sglang
from engines.driven import OURS, Gather, SGLang, added, agrees, batch, not_served_with, nothing_kept, record, weights

from workbench.problem import MoEShape


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    yield from nothing_kept(monkeypatch, tmp_path)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Gather:
    return added(Gather(), monkeypatch)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config.activation": "gelu"}, "activation: expected gated silu, got gelu"),
        ({"config.is_gated": False}, "activation: expected gated silu, got silu"),
        ({"config.gemm1_alpha": 1.7}, "activation: expected SwiGLU without alpha, beta and limit"),
        ({"config.swiglu_limit": 7.0}, "activation: expected SwiGLU without alpha, beta and limit"),
        ({"config.apply_router_weight_on_input": True}, "apply_router_weight_on_input: expected False"),
        ({"config.no_combine": True}, "no_combine: expected False"),
        ({"layer.w13_weight_bias": torch.zeros(8, 256)}, "bias: expected none"),
        ({"method.use_mxfp8": True}, "weights: expected FP8 in blocks of [128, 128], got [128, 128]"),
        (
            {"runner.runner_backend": fake_sglang.MoeRunnerBackend.DEEP_GEMM},
            "runner: expected triton, which keeps the weights as they are served, got MoeRunnerBackend.DEEP_GEMM",
        ),
    ],
)
def test_what_sglang_asks_of_a_layer_beyond_ours_is_left_to_it(
    changes: dict[str, Any],
    reason: str,
    ours: Gather,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    not_served_with(SGLang(monkeypatch), changes, reason, tmp_path, caplog)


def test_sglang_runs_what_an_all_to_all_dispatched(
    ours: Gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, (OURS, 10.0))
    engine = SGLang(monkeypatch)
    engine.register()
    engine.build(weights())
    engine.loaded()
    inputs = batch()
    topk_output = fake_sglang.StandardTopKOutput(inputs.topk_weights, inputs.topk_ids, torch.empty(0))
    engine.method.apply(engine.module, fake_sglang.DeepEPLLDispatchOutput(inputs.tokens, None, topk_output))
    assert engine.num_own_calls == 1


def test_sglangs_fused_shared_experts_are_part_of_the_shape(
    ours: Gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = MoEShape(9, 256, 128, 3, num_shared_experts=1)
    record(tmp_path, (OURS, 10.0), shape=shape)
    engine = SGLang(monkeypatch)
    engine.register()
    engine.build(weights(0, shape))
    engine.loaded()
    inputs = batch(shape=shape)
    assert agrees(engine.call(inputs), weights(0, shape), inputs, engine.factor, inputs.topk_ids)
    assert engine.num_own_calls == 0
