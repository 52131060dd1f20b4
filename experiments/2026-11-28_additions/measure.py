"""Times additions.cu on an H200, with nvcc (or with cubins that --compile made beside this file, which needs no GPU):

PYTHONPATH=. python experiments/2026-11-28_additions/measure.py [--compile]
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WIDTHS = (64, 128, 256, 512)
HIDDEN, TILE_ROWS, STAGE_BYTES, NUM_STAGES = 7168, 48, 32768, 6


def compiled(row_bytes: int, slabs: int) -> Path:
    cubin = HERE / f"additions_{row_bytes}_{slabs}.cubin"
    if not cubin.exists():
        target = ["-gencode=arch=compute_90a,code=sm_90a", "-I", str(HERE.parents[1] / "kernels_cuda" / "include")]
        options = ["-cubin", "-std=c++17", "-O3", *target, f"-DROW_BYTES={row_bytes}", f"-DSLABS={slabs}"]
        subprocess.run(["nvcc", *options, str(HERE / "additions.cu"), "-o", str(cubin)], check=True)
    return cubin


def main() -> None:
    cubins = {(row_bytes, slabs): compiled(row_bytes, slabs) for slabs in (0, 1) for row_bytes in WIDTHS}
    if "--compile" in sys.argv:
        return
    import cupy
    import numpy as np
    import torch

    from experiments.cold_l2 import graph_difference

    device = torch.device("cuda", 0)
    print(torch.cuda.get_device_name(device))
    weights = torch.zeros(705 << 20, dtype=torch.uint8, device=device)
    for num_tokens in (256, 1024, 4096, 8192):
        num_rows = num_tokens * 9
        num_tiles = num_rows // TILE_ROWS
        out = torch.zeros(num_tokens, HIDDEN, dtype=torch.bfloat16, device=device)
        tiles = [torch.randperm(num_tokens, device=device)[:TILE_ROWS] for _ in range(num_tiles)]
        tokens = torch.stack(tiles).int().contiguous()
        print(f"M={num_tokens}: {num_tiles * TILE_ROWS * HIDDEN * 2 / 1e6:.0f} MB of additions, 705 MiB of weights")
        for (row_bytes, slabs), cubin in cubins.items():
            function = cupy.RawModule(path=str(cubin)).get_function("additions")
            function.max_dynamic_shared_size_bytes = NUM_STAGES * STAGE_BYTES

            def call(tiles: int, stages: int, function=function, tokens=tokens, out=out) -> None:
                arguments = (out.data_ptr(), tokens.data_ptr(), np.uint32(tiles), weights.data_ptr(), np.uint32(stages))
                with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
                    function((132,), (288,), arguments, shared_mem=NUM_STAGES * STAGE_BYTES)

            stages = weights.numel() // STAGE_BYTES
            cases = {"additions": (num_tiles, 0), "weights": (0, stages), "both": (num_tiles, stages)}
            times = {name: graph_difference(lambda _, case=case: call(*case), device) for name, case in cases.items()}
            print(
                f"  by {'slabs' if slabs else 'tiles'}, {row_bytes:3} bytes of a row: "
                + ", ".join(f"{name} {us:6.1f}" for name, us in times.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
