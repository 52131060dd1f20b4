"""Variants of a third party that go wrong in every way that the workbench must survive. Their config says which.

They are not registered here, so that a test may import them without every other test finding them among the variants.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from workbench.problem import MoEInputs, MoEShape, MoEWeights
from workbench.variant import Backend, CompileReport, Config, Support, Variant
from workbench.verify import expected_output

HANG_S = 3600.0
ILLEGAL_ADDRESS = "CUDA error: an illegal memory access was encountered"


@dataclasses.dataclass
class Prepared:
    weights: MoEWeights
    num_runs: int = 0


class Faulty(Variant):
    """Right but for its fault: config `fault`, or none."""

    name: ClassVar[str] = "torch.faulty"
    backend: ClassVar[Backend] = "torch"
    graph_capturable = False
    tolerance = 0.01

    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        return Support.yes()

    def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
        return (Config(),)

    def prepare(self, weights: MoEWeights) -> Prepared:
        return Prepared(weights)

    def align(self, prepared: Prepared, inputs: MoEInputs, config: Config) -> MoEInputs:
        inputs = inputs.quantise()
        if config.get("fault") == "wrong when aligned":
            return dataclasses.replace(inputs, topk_weights=2 * inputs.topk_weights)
        return inputs

    def run(self, prepared: Prepared, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        prepared.num_runs += 1
        fault = config.get("fault")
        out.copy_(expected_output(prepared.weights, inputs))
        if fault == "half":
            out *= 0.5
        elif fault == "NaN":
            out[0, 0] = torch.nan
        elif fault == "last row left out":
            out[-1] = torch.empty_like(out[-1])
        elif fault == "right once" and prepared.num_runs > 1:
            out *= 0.5
        elif fault == "writes inputs":
            inputs.topk_weights.mul_(2)
        elif fault == "writes weights":
            prepared.weights.w2.view(torch.uint8)[1, 2, 3] ^= 1
        elif fault == "writes before out":
            out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()
        elif fault == "writes behind out":
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
        elif fault == "raises":
            raise ValueError("no tile of that size\nand a second line")
        elif fault == "raises who":
            raise ValueError(f"process {os.getpid()}")
        elif fault == "breaks the device":  # what a process finds after an illegal address, but for the GPU
            sys.modules["__main__"]._device_fault = lambda device: ILLEGAL_ADDRESS  # type: ignore[attr-defined]
            raise RuntimeError(ILLEGAL_ADDRESS)
        elif fault == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == "exits":
            print("an assertion in a library\nlast words", flush=True)
            os._exit(3)
        elif fault == "hangs":
            time.sleep(HANG_S)
        elif fault == "illegal address":
            launch_faulty_kernel("*reinterpret_cast<volatile unsigned*>(8) = 1;", out)
        elif fault == "endless kernel":
            launch_faulty_kernel("while (*memory != 0xdeadbeef) {}", out.zero_())
        elif fault == "dies when timed" and prepared.num_runs > 9:
            os.kill(os.getpid(), signal.SIGSEGV)

    def sources(self) -> tuple[Path, ...]:
        return (Path(__file__),)


def launch_faulty_kernel(body: str, out: torch.Tensor) -> None:
    """One thread on the current stream; `memory` points to `out`."""
    import cupy

    source = f'extern "C" __global__ void faulty(volatile unsigned* memory) {{ {body} }}'
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        cupy.RawKernel(source, "faulty")((1,), (1,), (out.data_ptr(),))


class Unpreparable(Faulty):
    """Raises while it prepares."""

    name = "torch.unpreparable"

    def prepare(self, weights: MoEWeights) -> Any:
        raise RuntimeError("out of registers")


class Unsupporting(Faulty):
    """Serves nothing."""

    name = "torch.unsupporting"

    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        return Support.no("hidden size 128 is too small")


class Interpreted(Faulty):
    """Says whether its process interprets Triton kernels."""

    name = "triton.telltale"
    backend = "triton"

    def run(self, prepared: Prepared, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        raise ValueError(f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')}")


class Compiled(Faulty):
    """Compiles two kernels, one of which spills."""

    name = "cuda.compiled"
    backend = "cuda"

    def compile(self, shape: MoEShape, configs: Iterable[Config]) -> list[CompileReport]:
        return [
            report
            for config in configs
            for report in (
                CompileReport("up", config, 255, 32, 8, 0, 1024, ("C7508: setmaxnreg ignored",)),
                CompileReport("align", config, 32, 0, 0, 0, 1024),
            )
        ]
