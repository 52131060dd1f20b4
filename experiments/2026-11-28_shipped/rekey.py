"""Traces of cuda.sm90_stream that hold although its sources have changed, since the machine code has not:

    PYTHONPATH=. python experiments/2026-11-28_shipped/rekey.py <traces.jsonl> <package> <kept.jsonl>

`package` is kernels_cuda of the revision that was measured, renamed as ../2026-11-27_fused_tickets/measure.py says.
Both compile every kernel that a trace was made with. Where the machine code of all is the same, as nvdisasm prints it,
the trace gets the digest of the sources as they are; where not, nothing is kept of the workload, by no variant: what
remains is whole at each M.
"""

from __future__ import annotations

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.traces import read
from kernels_cuda import sm90_stream
from kernels_cuda.sm90 import NUM_SMS
from kernels_cuda.sm90_stream import works_out_tiles
from kernels_triton.compile import disassemble
from workbench import registry
from workbench.environment import sources_digest
from workbench.problem import MoEShape
from workbench.trace import Key
from workbench.variant import Config

STREAM = "cuda.sm90_stream"
Kernel = tuple[MoEShape, Config, bool]


def kernels(key: Key) -> list[Kernel]:
    """Those that a workload's layer calls and calls on tiles run."""
    routes = (False, True) if works_out_tiles(key.shape, key.num_tokens, key.config) else (False,)
    return [(key.shape, key.config, each) for each in routes]


def main(path: Path, package: str, kept: Path) -> None:
    traces, lines = read(path), path.read_text().splitlines()
    older = importlib.import_module(f"{package}.sm90_stream")
    wanted = {
        (shape.hidden_size, shape.intermediate_size, config, routes): (shape, config, routes)
        for one in traces
        if one.key.variant == STREAM
        for shape, config, routes in kernels(one.key)
    }

    def is_same(kernel: Kernel) -> bool:
        shape, config, routes = kernel
        before, now = (each._compile(config, shape, NUM_SMS, False, routes)[0] for each in (older, sm90_stream))
        if before.report(config, 0) != now.report(config, 0):  # registers and the like
            return False
        return disassemble(before.path) == disassemble(now.path)

    with ThreadPoolExecutor(2) as pool:
        same = dict(zip(wanted, pool.map(is_same, wanted.values()), strict=True))
    print(f"{sum(same.values())} of {len(same)} kernels are the same")
    changed = {
        (one.key.shape, one.key.num_tokens, one.key.routing)
        for one in traces
        if one.key.variant == STREAM
        and not all(same[s.hidden_size, s.intermediate_size, c, r] for s, c, r in kernels(one.key))
    }
    digest = sources_digest(registry.find(STREAM))
    with kept.open("w") as file:
        for one, line in zip(traces, lines, strict=True):
            if (one.key.shape, one.key.num_tokens, one.key.routing) in changed:
                continue
            record = json.loads(line)
            if one.key.variant == STREAM:
                record["key"]["sources"] = digest
            file.write(json.dumps(record) + "\n")
    for shape, num_tokens, routing in sorted((str(shape), *rest) for shape, *rest in changed):
        print("left out:", shape, f"M={num_tokens}", routing)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
