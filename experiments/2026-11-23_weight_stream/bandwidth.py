"""How fast the weights of a layer can be read, by the way of asking (bandwidth.cu).

PYTHONPATH=. python experiments/2026-11-23_weight_stream/bandwidth.py    # on an H200, with nvcc
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import cupy
import numpy as np
import torch

from experiments.cold_l2 import graph_difference
from kernels_cuda import tma
from workbench.models import shape_of_alias

HERE = Path(__file__).parent
DEVICE = torch.device("cuda", 0)
NUM_STAGES = 6
STAGE_BYTES = 32768
SAMPLES = 12


def kernel(folder: str, tensor_maps: int, piece_bytes: int) -> cupy.RawKernel:
    cubin = Path(folder) / f"bandwidth_{tensor_maps}_{piece_bytes}.cubin"
    defines = [f"-DNUM_STAGES={NUM_STAGES}", f"-DTENSOR_MAPS={tensor_maps}", f"-DPIECE_BYTES={piece_bytes}"]
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-I", str(HERE.parents[1] / "kernels_cuda" / "include")]
    source = str(HERE / "bandwidth.cu")
    subprocess.run(["nvcc", "-cubin", "-std=c++17", "-O3", *target, *defines, source, "-o", str(cubin)], check=True)
    function = cupy.RawModule(path=str(cubin)).get_function("bandwidth")
    function.max_dynamic_shared_size_bytes = NUM_STAGES * STAGE_BYTES
    return function


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ways = {"boxes": kernel(folder, 1, STAGE_BYTES)}
        ways |= {f"{piece >> 10} KB": kernel(folder, 0, piece) for piece in (32768, 16384, 8192, 4096)}
        for alias in ("dsv3_tp16", "dsv3_tp8", "qwen3next_tp4"):
            shape = shape_of_alias(alias)
            experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
            w13 = torch.zeros(experts, 2 * intermediate, hidden, dtype=torch.uint8, device=DEVICE)
            w2 = torch.zeros(experts, hidden, intermediate, dtype=torch.uint8, device=DEVICE)
            rows = tuple(count * intermediate for count in (4, 1, 32, 2))
            maps = tma.encode(w13, (hidden, experts * 2 * intermediate), (hidden,), (128, 128)) + tma.encode(
                w2, (intermediate, 8, 2, experts * hidden // 32, 2), rows, (128, 8, 2, 4, 2)
            )
            for num_experts in (9, 60, experts):
                numbers = (hidden // 128, intermediate // 128, num_experts, hidden // 256)
                params = maps + np.array([w13.data_ptr(), w2.data_ptr()], np.uint64).tobytes()
                params = (params + np.array(numbers, np.uint32).tobytes()).ljust(320, b"\0")
                argument = np.frombuffer(params, dtype="V320")[0]
                num_bytes = num_experts * 3 * intermediate * hidden
                times = {}
                for name, function in ways.items():

                    def call(_: int, function: cupy.RawKernel = function, argument: np.void = argument) -> None:
                        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
                            function((132,), (64,), (argument,), shared_mem=NUM_STAGES * STAGE_BYTES)

                    times[name] = graph_difference(call, samples=SAMPLES)
                figures = ", ".join(f"{name} {us:.1f} us {num_bytes / us / 1e6:.2f} TB/s" for name, us in times.items())
                print(f"{alias}, {num_experts} experts, {num_bytes >> 20} MB: {figures}", flush=True)


if __name__ == "__main__":
    main()
