"""Both stand-in engines as the tests of the plugins drive them, with variants that note their runs and tables to choose
them by."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recorded
import torch
from engines import fake_sglang, fake_vllm

from reference.moe import moe_from_bf16
from reference.quant import dequantise_activations, dequantise_w13, dequantise_weights, quantise_activations
from workbench import registry
from workbench import table as tables
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure, passed
from workbench.plugins import sglang, swap, vllm
from workbench.problem import MoEInputs, MoEShape, MoEWeights, Workload
from workbench.variant import Config, Support, Variant

CPU = torch.device("cpu")
SHAPE = MoEShape(8, 256, 128, 2)
OURS = "torch.test_gather"
COPYING = "torch.test_copying"


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


def added(variant: Gather, monkeypatch: pytest.MonkeyPatch) -> Gather:
    """`variant`, among those that are registered until the test ends."""
    monkeypatch.setitem(registry.variants(), variant.name, variant)  # type: ignore[arg-type]
    return variant


class VLLM:
    """One stand-in engine with one layer in it, as the tests drive both."""

    name = "vllm"

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
    def parts(self) -> dict[str, Any]:
        """What the plugin looks at, by the names that tests give."""
        return {"layer": self.module, "config": self.module.moe_config, "method": self.method}

    @property
    def num_own_calls(self) -> int:
        return self.method.moe_kernel.num_calls


class SGLang(VLLM):
    name = "sglang"

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
    def parts(self) -> dict[str, Any]:
        method = self.method
        return {"layer": self.module, "config": method.moe_runner_config, "method": method, "runner": method.runner}

    @property
    def num_own_calls(self) -> int:
        return self.method.runner.num_calls


def nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Around each test, as an autouse fixture: nothing recorded, set or kept of the ones before."""
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


def not_served(engine: VLLM, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """One call runs in the engine, and the log says why."""
    caplog.set_level(logging.INFO)
    engine.loaded()
    engine.call(batch())
    assert engine.num_own_calls == 1
    assert said(caplog) == [f"{engine.name}: the engine's own kernels run: {reason}"]


def not_served_with(
    engine: VLLM, changes: Mapping[str, Any], reason: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer of which ours is recorded is left to the engine once `changes`, part.attribute to value, are made."""
    record(folder, (OURS, 10.0))
    engine.register()
    engine.build(weights())
    for place, value in changes.items():
        owner, _, attribute = place.partition(".")
        setattr(engine.parts[owner], attribute, value)
    not_served(engine, reason, caplog)
