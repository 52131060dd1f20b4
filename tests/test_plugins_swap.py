"""The plugins against stand-ins of their engines: they take over where the table says so, and change nothing else."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from engines.driven import (
    COPYING,
    OURS,
    VLLM,
    Copying,
    Gather,
    SGLang,
    added,
    agrees,
    batch,
    copy_of,
    not_served,
    nothing_kept,
    record,
    record_each,
    said,
    weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

from workbench import registry
from workbench.plugins import swap
from workbench.variant import Config


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    yield from nothing_kept(monkeypatch, tmp_path)


@pytest.fixture(params=[VLLM, SGLang], ids=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VLLM:
    return request.param(monkeypatch)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Gather:
    return added(Gather(), monkeypatch)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Gather:
    return added(Copying(COPYING), monkeypatch)


def test_ours_runs_where_the_table_has_measured_it(engine: VLLM, ours: Gather, tmp_path: Path) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.register()
    engine.build(weights())
    engine.loaded()
    made = ours.num_runs
    for runs, num_tokens in enumerate((1, 4, 8), start=1):
        inputs = batch(num_tokens)
        assert agrees(engine.call(inputs), weights(), inputs, engine.factor, inputs.topk_ids)
        assert (ours.num_runs - made, engine.num_own_calls) == (runs, 0)


def test_the_engines_runs_outside_the_measured_range(engine: VLLM, ours: Gather, tmp_path: Path) -> None:
    record(tmp_path, (OURS, 10.0), tokens=(2, 8))
    engine.register()
    engine.build(weights())
    engine.loaded()
    made = ours.num_runs
    for calls, num_tokens in enumerate((1, 9), start=1):
        inputs = batch(num_tokens)
        assert agrees(engine.call(inputs), weights(), inputs, engine.factor, inputs.topk_ids)
        assert (ours.num_runs, engine.num_own_calls) == (made, calls)


def test_the_engines_runs_where_nothing_is_measured(
    engine: VLLM, ours: Gather, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine.register()
    for _ in range(2):
        engine.build(weights())
        engine.loaded()
        assert engine.call(batch()).shape == (4, 256)
    assert (ours.num_runs, engine.num_own_calls) == (0, 1)
    (line,) = said(caplog)
    assert line.startswith(
        f"{engine.name}: E8_N256_K256_top2_shared0: the engine's own kernels run: nothing was measured"
    )
    assert "workbench tune --E 8 --N 256 --K 256 --top-k 2 --no-shared-expert" in line


def test_the_engines_runs_where_its_own_kernel_is_the_fastest(
    engine: VLLM, ours: Gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    peer = recorded.variant(f"{engine.name}.fused_experts", configs=lambda num_tokens: [Config()])
    monkeypatch.setitem(registry.variants(), peer.name, peer)  # type: ignore[arg-type]
    record(tmp_path, (OURS, 20.0), (peer.name, 10.0))
    engine.register()
    engine.build(weights())
    engine.loaded()
    engine.call(batch())
    assert (ours.num_runs, engine.num_own_calls) == (0, 1)
    assert f"{peer.name}, the engine's own, is chosen" in said(caplog)[0]


def test_a_variant_that_cannot_be_captured_does_not_run(
    engine: VLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert not registry.find("torch.loop").graph_capturable
    record(tmp_path, ("torch.loop", 10.0))
    engine.register()
    engine.build(weights())
    engine.loaded()
    engine.call(batch())
    assert engine.num_own_calls == 1
    assert "(torch.loop reads device data on the host) at M=1, 8" in said(caplog)[0]


def test_a_variant_that_only_wins_between_the_measured_m_is_not_prepared_while_serving(
    engine: VLLM, ours: Gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, steady = Gather("torch.test_prefill"), Gather("torch.test_steady")
    for variant in (prefill, steady):
        monkeypatch.setitem(registry.variants(), variant.name, variant)  # type: ignore[arg-type]
    record_each(
        tmp_path,
        {
            2: [(OURS, 10.0), (prefill.name, 100.0), (steady.name, 12.0)],
            32: [(OURS, 100.0), (prefill.name, 10.0), (steady.name, 12.0)],
        },
    )
    engine.register()
    engine.build(weights())
    engine.loaded()
    for own_calls, num_tokens in ((0, 2), (0, 32), (1, 8)):
        engine.call(batch(num_tokens))
        assert engine.num_own_calls == own_calls
    assert steady.num_runs == 0


def test_what_was_decided_is_said_once(
    engine: VLLM, ours: Gather, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    record(tmp_path, (OURS, 10.0))
    engine.register()
    for seed in (0, 1):
        engine.build(weights(seed))
        engine.loaded()
        engine.call(batch())
    assert said(caplog) == [
        f"{engine.name}: E8_N256_K256_top2_shared0: {OURS} at M=1, 8; outside of these the engine's own"
    ]


def test_a_layer_without_a_loading_hook_is_made_on_its_first_call(engine: VLLM, ours: Gather, tmp_path: Path) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.build(weights())
    engine.loaded()
    engine.register()
    inputs = batch()
    assert agrees(engine.call(inputs), weights(), inputs, engine.factor, inputs.topk_ids)
    assert engine.num_own_calls == 0


def test_no_weights_are_copied(engine: VLLM, ours: Gather, tmp_path: Path) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.register()
    engine.build(weights())
    engine.loaded()
    (made,) = swap._swaps.values()
    assert made.layer is not None
    assert made.layer.weights.w13.data_ptr() == engine.module.w13_weight.data_ptr()
    assert made.layer.weights.w2_scale.data_ptr() == engine.module.w2_weight_scale_inv.data_ptr()


def test_a_variant_that_keeps_a_copy_is_left_out_unless_allowed(
    engine: VLLM,
    ours: Gather,
    copying: Gather,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    record(tmp_path, (OURS, 20.0), (COPYING, 10.0))
    engine.register()
    for mode, runs, idle in (("on", ours, copying), ("copies", copying, ours)):
        monkeypatch.setenv("MOE_WORKBENCH_PLUGIN", mode)
        engine.build(weights())
        engine.loaded()
        made = runs.num_runs, idle.num_runs
        inputs = batch()
        assert agrees(engine.call(inputs), weights(), inputs, engine.factor, inputs.topk_ids)
        assert (runs.num_runs, idle.num_runs) == (made[0] + 1, made[1])
    without, with_copies = said(caplog)
    assert without.endswith(f"left out for keeping a copy of the weights: {COPYING} (MOE_WORKBENCH_PLUGIN=copies)")
    assert f"{COPYING} at M=1, 8" in with_copies


def test_weights_replaced_by_new_tensors_are_used(engine: VLLM, ours: Gather, tmp_path: Path) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.register()
    engine.build(weights(0))
    engine.loaded()
    inputs = batch()
    engine.call(inputs)
    for notified, seed in ((True, 1), (False, 2)):
        engine.put(weights(seed))
        if notified:
            engine.loaded()
        assert agrees(engine.call(inputs), weights(seed), inputs, engine.factor, inputs.topk_ids)
    assert engine.num_own_calls == 0


@pytest.mark.parametrize("mode", ["on", "copies"])
def test_weights_written_in_place_are_used(
    engine: VLLM, ours: Gather, copying: Gather, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_PLUGIN", mode)
    record(tmp_path, (OURS, 20.0), (COPYING, 10.0))
    engine.register()
    engine.build(copy_of(weights(0)))
    engine.loaded()
    inputs = batch()
    engine.call(inputs)
    (before,) = swap._swaps.values()
    engine.module.w13_weight.data.copy_(weights(1).w13)
    engine.module.w13_weight_scale_inv.data.copy_(weights(1).w13_scale)
    engine.module.w2_weight.data.copy_(weights(1).w2)
    engine.module.w2_weight_scale_inv.data.copy_(weights(1).w2_scale)
    engine.loaded()
    assert agrees(engine.call(inputs), weights(1), inputs, engine.factor, inputs.topk_ids)
    (after,) = swap._swaps.values()
    assert (after.layer is before.layer) == (mode == "on")  # graphs captured on it stay right


def test_a_layer_goes_with_the_engines(engine: VLLM, ours: Gather, tmp_path: Path) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.register()
    engine.build(weights())
    engine.loaded()
    assert len(swap._swaps) == 1
    del engine.module, engine.method
    gc.collect()
    assert len(swap._swaps) == 0


def test_global_ids_go_through_the_expert_map(engine: VLLM, ours: Gather, tmp_path: Path) -> None:
    record(tmp_path, (OURS, 10.0))
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[4:12] = torch.arange(8, dtype=torch.int32)
    engine.register()
    engine.build(weights(), expert_map)
    engine.loaded()
    inputs = batch()
    for topk_ids in (
        torch.tensor([[3, 4], [11, 12], [5, 10], [0, 15]], dtype=torch.int32),
        torch.tensor([[4, 5], [6, 7], [8, 9], [10, 11]], dtype=torch.int64),
    ):
        on_rank = expert_map[topk_ids.long()]
        out = engine.call(dataclasses.replace(inputs, topk_ids=topk_ids))
        assert agrees(out, weights(), inputs, engine.factor, on_rank)
    assert engine.num_own_calls == 0


def test_an_id_of_minus_one_stays_so_under_an_expert_map() -> None:
    expert_map = torch.tensor([0, 1, -1, -1], dtype=torch.int32)
    topk_ids = torch.tensor([[-1, 1], [2, 0]])
    topk_weights, mapped = swap.routing(torch.ones(2, 2, dtype=torch.bfloat16), topk_ids, expert_map)
    assert mapped.tolist() == [[-1, 1], [-1, 0]]
    assert (mapped.dtype, topk_weights.dtype) == (torch.int32, torch.float32)


def test_routing_that_is_not_contiguous_is_made_so() -> None:
    topk_weights, topk_ids = swap.routing(torch.rand(4, 3)[:, :2], torch.arange(12).view(4, 3)[:, 1:])
    assert topk_weights.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_ids[3].tolist() == [10, 11]


def test_a_batch_that_is_not_bf16_runs_in_the_engine(engine: VLLM, ours: Gather, tmp_path: Path) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.register()
    engine.build(weights())
    engine.loaded()
    inputs = batch()
    out = engine.call(dataclasses.replace(inputs, x=inputs.tokens.half()))
    assert (out.dtype, engine.num_own_calls) == (torch.float16, 1)


def test_another_block_size_is_not_served(
    engine: VLLM, ours: Gather, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.register()
    engine.build(weights(), block=64)
    wording = {
        "vllm": "weight_block_size: expected [128, 128], got [64, 64]",
        "sglang": "weights: expected FP8 in blocks of [128, 128], got [64, 64]",
    }
    not_served(engine, wording[engine.name], caplog)


def test_scales_that_are_not_finite_are_left_to_the_engine(
    engine: VLLM, ours: Gather, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path, (OURS, 10.0))
    wrong = copy_of(weights())
    wrong.w2_scale[1, 0, 0] = torch.inf
    engine.register()
    engine.build(wrong)
    not_served(engine, "w2_scale: expected finite values, got inf at [1, 0, 0]", caplog)


def test_an_engine_that_lacks_what_is_read_is_left_alone(
    engine: VLLM, ours: Gather, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.register()
    engine.build(weights())
    del engine.method.weight_block_size
    engine.loaded()
    engine.call(batch())
    assert engine.num_own_calls == 1
    (line,) = said(caplog, logging.WARNING)
    assert "not a version that is known" in line
    assert "weight_block_size" in line


class HostReads(TorchDispatchMode):
    """The operators, as they are dispatched, that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func._schema.name, kwargs or {}
        waits = name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal")
        if waits or (name == "aten::_to_copy" and options.get("device") is not None):
            self.seen.append(name)
        return func(*args, **options)


@pytest.mark.parametrize("with_map", [False, True], ids=["all experts", "expert map"])
def test_after_the_first_call_nothing_is_read_on_the_host(
    engine: VLLM, ours: Gather, tmp_path: Path, with_map: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.register()
    engine.build(weights(), torch.arange(8, dtype=torch.int32) if with_map else None)
    engine.loaded()
    with HostReads() as first:
        engine.call(batch())
    assert "aten::_local_scalar_dense" in first.seen  # ids are checked on the first call: the mode does see such reads
    inputs = batch()
    for method in (
        "item",
        "tolist",
        "numpy",
        "cpu",
        "__bool__",
        "__int__",
        "__float__",
    ):  # of CPU tensors not dispatched
        monkeypatch.setattr(torch.Tensor, method, lambda tensor, *given: pytest.fail("a tensor was read on the host"))
    with HostReads() as later:
        engine.call(inputs)
    assert later.seen == []
    assert engine.num_own_calls == 0


def test_nothing_new_is_made_while_a_graph_is_captured(
    engine: VLLM, ours: Gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, (OURS, 10.0))
    engine.register()
    engine.build(weights())
    engine.loaded()
    engine.call(batch(4))
    made = ours.num_runs
    monkeypatch.setattr(swap, "_capturing", lambda: True)
    engine.call(batch(4))
    assert (ours.num_runs, engine.num_own_calls) == (made + 1, 0)
    engine.call(batch(3))
    assert (ours.num_runs, engine.num_own_calls) == (made + 1, 1)
    engine.put(weights(1))
    engine.call(batch(4))
    assert (ours.num_runs, engine.num_own_calls) == (made + 1, 2)
    monkeypatch.setattr(swap, "_capturing", lambda: False)
    engine.call(batch(3))  # what could not be decided then is decided now
    assert engine.num_own_calls == 2
