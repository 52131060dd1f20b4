"""Ready calls: what their launches hold when they are enqueued, that no two takers have the same one, and that a
variant called again computes the batch at hand."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from emulation.emulator import compiler_missing, emulated

from kernels_cuda import workspace
from kernels_cuda.calls import MAX_KEYS, Call, ReadyCalls
from kernels_cuda.launch import LaunchError
from kernels_cuda.sm90_fused import SM90Fused
from kernels_cuda.sm90_prefill import SM90Prefill, SM90PrefillDeterministic
from kernels_cuda.sm90_stream import SM90Stream, SM90StreamDeterministic
from reference.routing import align_block_size
from workbench.generate import make_inputs, make_weights
from workbench.problem import MoEShape, Workload
from workbench.variant import Variant
from workbench.verify import expected_output

CPU = torch.device("cpu")
PARTS = workspace.layout({"counter": 16}, {"h": 200, "sums": 64})


class Params(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("x", "h", "zeros", "partial_sums"))


@dataclass
class FakeLaunch:
    """Remembers what it is enqueued with."""

    params: Params = field(default_factory=Params)
    seen: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    fails: bool = False

    def enqueue(self, stream: int) -> None:
        if self.fails:
            raise LaunchError("refused")
        self.seen.append((stream, {name: getattr(self.params, name) for name, _ in Params._fields_}))


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the workspaces of the coming calls lie: at the last of these."""
    starts = [0x1000]

    class Memory:
        def data_ptr(self) -> int:
            return starts[-1]

    monkeypatch.setattr(workspace, "allocate", lambda parts, device: Memory())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0x77, raising=False)
    return starts


def make(calls: ReadyCalls, key: object, launch: Any) -> Call:
    return calls.make(key, CPU, PARTS, [(launch, {"zeros": workspace.FILLED, "partial_sums": "sums"})])


def test_the_fields_named_like_parts_follow_the_workspace(start: list[int]) -> None:
    calls, launch = ReadyCalls(), FakeLaunch()
    call = make(calls, "key", launch)
    for x, at in ((1, 0x1000), (2, 0x1000), (3, 0x9000)):
        start.append(at)
        (params,) = call.params
        params.x = x
        call.enqueue()
        assert launch.seen[-1] == (0x77, {"x": x, "h": at + 128, "zeros": at, "partial_sums": at + 384})


def test_a_call_is_idle_from_when_it_is_enqueued_until_it_is_taken(start: list[int]) -> None:
    calls = ReadyCalls()
    assert calls.take("key") is None
    call = make(calls, "key", FakeLaunch())
    assert calls.take("key") is None
    call.enqueue()
    assert calls.take("other") is None
    assert calls.take("key") is call
    assert calls.take("key") is None


def test_a_call_whose_launch_failed_is_dropped(start: list[int]) -> None:
    calls = ReadyCalls()
    call = make(calls, "key", FakeLaunch(fails=True))
    with pytest.raises(LaunchError, match="refused"):
        call.enqueue()
    assert calls.take("key") is None


def test_threads_never_have_the_same_call(start: list[int]) -> None:
    calls, launches = ReadyCalls(), []

    def work(number: int) -> None:
        for _ in range(500):
            call = calls.take("key")
            if call is None:
                launches.append(FakeLaunch())
                call = make(calls, "key", launches[-1])
            (params,) = call.params
            params.x = number
            time_for_others.wait(0)
            assert params.x == number
            call.enqueue()

    time_for_others = threading.Event()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(launch.seen) for launch in launches) == 4 * 500
    assert len(launches) <= 4


def test_so_many_kinds_of_calls_are_kept(start: list[int]) -> None:
    calls = ReadyCalls()
    for key in range(MAX_KEYS + 1):
        make(calls, key, FakeLaunch()).enqueue()
    assert calls.take(0) is None
    assert calls.take(MAX_KEYS) is not None


@pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing() or "there")
@pytest.mark.parametrize(
    "variant",
    [SM90Fused(), SM90Stream(), SM90StreamDeterministic(), SM90Prefill(), SM90PrefillDeterministic()],
    ids=lambda variant: variant.name,
)
def test_a_variant_called_again_computes_the_batch_at_hand(variant: Variant) -> None:
    shape, num_tokens = MoEShape(3, 256, 128, 2), 9
    weights = make_weights(shape, seed=0, device=CPU)
    config = next(iter(variant.configs(shape, num_tokens)))
    with emulated(num_sms=4) as gpu:
        prepared = variant.prepare(weights)
        for seed in range(2):
            inputs = make_inputs(Workload(shape, num_tokens, seed=seed), CPU)
            quantised = inputs.quantise()
            expected = expected_output(weights, inputs)
            for given in (inputs, quantised, variant.align(prepared, quantised, config)):
                out = torch.full((num_tokens, shape.hidden_size), torch.nan, dtype=torch.bfloat16)
                variant.run(prepared, given, out, config)
                gpu.synchronize()
                assert (out.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing() or "there")
def test_routing_aligned_by_someone_else_adds_to_out_also_when_called_again() -> None:
    shape, variant = MoEShape(3, 256, 128, 2), SM90Fused()
    weights = make_weights(shape, seed=0, device=CPU)
    config = next(iter(variant.configs(shape, 9)))
    with emulated(num_sms=4) as gpu:
        prepared = variant.prepare(weights)
        for seed in range(2):
            inputs = make_inputs(Workload(shape, 9, seed=seed, input_kind="fp8"), CPU)
            aligned = align_block_size(inputs.topk_ids, config.integer("block_m"), shape.num_experts)
            expected = 1.0 + 0.5 * expected_output(weights, inputs)
            out = torch.ones(9, shape.hidden_size, dtype=torch.bfloat16)
            tokens: Any = (inputs.x_q, inputs.x_scale)
            variant.run_aligned(prepared, *tokens, aligned, inputs.topk_weights, 0.5, out, config)
            gpu.synchronize()
            assert (out.float() - expected).norm() <= 0.01 * expected.norm()
