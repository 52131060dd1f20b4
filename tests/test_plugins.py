"""The plugins against stand-ins of their engines: they take over where the table says so, and change nothing else."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recorded
import torch
from engines import fake_sglang, fake_vllm
from torch.utils._python_dispatch import TorchDispatchMode

from reference.moe import moe_from_bf16
from reference.quant import dequantise_activations, dequantise_w13, dequantise_weights, quantise_activations
from workbench import registry
from workbench import table as tables
from workbench.errors import InputError
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure, passed
from workbench.plugins import sglang, swap, vllm
from workbench.problem import MoEInputs, MoEShape, MoEWeights, Workload
from workbench.variant import Config, Support, Variant

CPU = torch.device("cpu")
SHAPE = MoEShape(8, 256, 128, 2)
OURS = "torch.test_gather"
COPYING = "torch.test_copying"
ROOT = Path(__file__).parent.parent


class Gather(Variant):
    """Reads the weights where they lie, and nothing on the host."""

    backend = "torch"

    def __init__(self, name: str = OURS) -> None:
        self.name = name  # type: ignore[misc]
        self.num_runs = 0

    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        return Support.yes()

    def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
        return [Config()]

    def prepare(self, weights: MoEWeights) -> Any:
        return weights

    def run(self, prepared: Any, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        self.num_runs += 1
        w13 = dequantise_w13(prepared.w13, prepared.w13_scale)
        w2 = dequantise_weights(prepared.w2, prepared.w2_scale)
        inputs = inputs.quantise()
        assert inputs.x_q is not None
        assert inputs.x_scale is not None
        x = dequantise_activations(inputs.x_q, inputs.x_scale)
        experts = inputs.topk_ids.clamp(min=0)
        weights = inputs.topk_weights.masked_fill(inputs.topk_ids < 0, 0.0) * inputs.routed_scaling_factor
        gate, up = torch.einsum("mh,mknh->mkn", x, w13[experts]).chunk(2, dim=-1)
        activated = quantise_activations((torch.nn.functional.silu(gate) * up).flatten(0, 1))
        rows = dequantise_activations(*activated).unflatten(0, experts.shape)
        out.copy_(torch.einsum("mki,mkhi,mk->mh", rows, w2[experts], weights))

    def sources(self) -> tuple[Path, ...]:
        return (Path(__file__),)


class Copying(Gather):
    """The same on weights of its own, in memory that it keeps."""

    def prepare(self, weights: MoEWeights) -> Any:
        return dataclasses.replace(weights, w13=weights.w13.clone(), w2=weights.w2.clone())


class VLLM:
    """One stand-in engine with one layer in it, as the tests drive both."""

    name = "vllm"
    plugin = vllm

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.method_class = fake_vllm.install(monkeypatch)

    def register(self) -> None:
        vllm.register()

    def wrapped(self) -> tuple[Any, ...]:
        return self.method_class.apply, self.method_class.process_weights_after_loading

    def build(self, weights: MoEWeights, expert_map: torch.Tensor | None = None, block: int = 128) -> None:
        num_experts = weights.shape.num_experts if expert_map is None else len(expert_map)
        self.module = fake_vllm.RoutedExperts(weights, expert_map, fake_vllm.moe_config(weights, num_experts))
        self.method = self.method_class(SimpleNamespace(weight_block_size=[block, block]), self.module)
        self.module.quant_method = self.method
        self.factor = 1.0

    def put(self, weights: MoEWeights) -> None:
        fake_vllm.put(self.module, weights)

    def loaded(self) -> None:
        self.method.process_weights_after_loading(self.module)

    def call(self, inputs: MoEInputs) -> torch.Tensor:
        return self.module.forward_modular(inputs.tokens, inputs.topk_weights, inputs.topk_ids)

    @property
    def num_own_calls(self) -> int:
        return self.method.moe_kernel.num_calls


class SGLang(VLLM):
    name = "sglang"
    plugin = sglang

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.method_class, self.hooks = fake_sglang.install(monkeypatch)

    def register(self) -> None:
        sglang.register()
        self.hooks.apply_hooks()

    def build(self, weights: MoEWeights, expert_map: torch.Tensor | None = None, block: int = 128) -> None:
        self.factor = 2.5
        shape = weights.shape
        config = fake_sglang.MoeRunnerConfig(
            num_experts=shape.num_experts if expert_map is None else len(expert_map),
            num_local_experts=shape.num_experts,
            top_k=shape.top_k,
            num_fused_shared_experts=shape.num_shared_experts,
            routed_scaling_factor=self.factor,
        )
        self.method = self.method_class(SimpleNamespace(weight_block_size=[block, block]))
        self.module = fake_sglang.FusedMoE(weights, expert_map, self.method, config)

    def put(self, weights: MoEWeights) -> None:
        fake_sglang.put(self.module, weights)

    def call(self, inputs: MoEInputs) -> torch.Tensor:
        return self.module(inputs.tokens, inputs.topk_weights, inputs.topk_ids)

    @property
    def num_own_calls(self) -> int:
        return self.method.runner.num_calls


@pytest.fixture(params=[VLLM, SGLang], ids=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VLLM:
    return request.param(monkeypatch)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Gather:
    variant = Gather()
    monkeypatch.setitem(registry.variants(), variant.name, variant)  # type: ignore[arg-type]
    return variant


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Copying:
    variant = Copying(COPYING)
    monkeypatch.setitem(registry.variants(), variant.name, variant)  # type: ignore[arg-type]
    return variant


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    monkeypatch.delenv("MOE_WORKBENCH_PLUGIN", raising=False)
    monkeypatch.delenv("MOE_WORKBENCH_EXCLUDE", raising=False)
    swap._say.cache_clear()
    swap._copying.clear()
    yield
    swap._swaps.clear()


def record(folder: Path, *figures: tuple[str, float], tokens: Iterable[int] = (1, 8), shape: MoEShape = SHAPE) -> None:
    """A selection table in `folder` in which each variant's layer takes so many microseconds, whatever M."""
    record_each(folder, {num_tokens: figures for num_tokens in tokens}, shape)


def record_each(folder: Path, figures: Mapping[int, Iterable[tuple[str, float]]], shape: MoEShape = SHAPE) -> None:
    variants = registry.variants()
    digests = {name: tables.sources_digest(variants[name]) for each in figures.values() for name, _ in each}
    traces = [
        trace
        for num_tokens, each in figures.items()
        for name, median_us in each
        for trace in recorded.both(
            recorded.key(variants[name], Config(), num_tokens, shape=shape, sources=digests[name]), median_us
        )
    ]
    tables.save(tables.build(traces, recorded.HERE, variants), folder / tables.SELECTION_FILE)


def batch(num_tokens: int = 4, shape: MoEShape = SHAPE) -> MoEInputs:
    return make_inputs(Workload(shape, num_tokens), CPU)


@functools.cache
def weights(seed: int = 0, shape: MoEShape = SHAPE) -> MoEWeights:
    return make_weights(shape, seed, CPU)


def copy_of(given: MoEWeights) -> MoEWeights:
    return MoEWeights(given.shape, *(each.clone() for each in (given.w13, given.w13_scale, given.w2, given.w2_scale)))


def agrees(out: torch.Tensor, of: MoEWeights, inputs: MoEInputs, factor: float, topk_ids: torch.Tensor) -> bool:
    expected = moe_from_bf16(
        inputs.tokens, of.w13, of.w13_scale, of.w2, of.w2_scale, inputs.topk_weights, topk_ids, factor
    )
    return out.dtype is torch.bfloat16 and passed(measure(out, expected, 0.005))


def said(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    records = [each for each in caplog.records if each.name.startswith("workbench.plugins") and each.levelno >= level]
    return [each.getMessage() for each in records]


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
    copying: Copying,
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
    engine: VLLM, ours: Gather, copying: Copying, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
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


def not_served(engine: VLLM, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """One call runs in the engine, and the log says why."""
    caplog.set_level(logging.INFO)
    engine.loaded()
    engine.call(batch())
    assert engine.num_own_calls == 1
    assert said(caplog) == [f"{engine.name}: the engine's own kernels run: {reason}"]


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
    record(tmp_path, (OURS, 10.0))
    engine = VLLM(monkeypatch)
    engine.register()
    engine.build(weights())
    parts = {"layer": engine.module, "config": engine.module.moe_config, "method": engine.method}
    for place, value in changes.items():
        owner, _, attribute = place.partition(".")
        setattr(parts[owner], attribute, value)
    not_served(engine, reason, caplog)


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
    record(tmp_path, (OURS, 10.0))
    engine = SGLang(monkeypatch)
    engine.register()
    engine.build(weights())
    method = engine.method
    parts = {"layer": engine.module, "config": method.moe_runner_config, "method": method, "runner": method.runner}
    for place, value in changes.items():
        owner, _, attribute = place.partition(".")
        setattr(parts[owner], attribute, value)
    not_served(engine, reason, caplog)


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


def test_a_method_of_another_signature_is_left_alone(engine: VLLM, caplog: pytest.LogCaptureFixture) -> None:
    def apply(self: Any, layer: Any, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        return x

    engine.method_class.apply = apply
    engine.register()
    assert engine.method_class.apply is apply
    (line,) = said(caplog, logging.WARNING)
    assert "router_logits" in line


def test_off_leaves_the_engine_as_it_is(engine: VLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine.wrapped()
    monkeypatch.setenv("MOE_WORKBENCH_PLUGIN", "off")
    engine.register()
    assert engine.wrapped() == before


def test_a_mode_that_there_is_not(engine: VLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_PLUGIN", "yes")
    with pytest.raises(InputError, match=r"^MOE_WORKBENCH_PLUGIN: expected off, on or copies, got 'yes'$"):
        engine.register()


def test_registering_again_wraps_once(engine: VLLM) -> None:
    before = engine.wrapped()
    for _ in range(3):
        engine.register()
    assert [each.__wrapped__ for each in engine.wrapped()] == list(before)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_without_the_engine_registering_does_nothing(name: str) -> None:
    """In a process of its own, with the engine hidden should it be installed."""
    program = (
        "import logging, sys\n"
        f"sys.modules[{name!r}] = None\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        f"from workbench.plugins.{name} import register\n"
        "register()\n"
        "assert not [loaded for loaded in sys.modules if loaded.startswith('kernels_')]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"DEBUG:workbench.plugins.{name}:{name}: not there:" in done.stderr


@pytest.mark.parametrize(("group", "plugin"), [("vllm.general_plugins", vllm), ("sglang.srt.plugins", sglang)])
def test_the_entry_points_name_the_plugins(group: str, plugin: Any) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    assert list(points) == ["moe_workbench"]
    module, _, function = points["moe_workbench"].partition(":")
    assert getattr(importlib.import_module(module), function) is plugin.register


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
