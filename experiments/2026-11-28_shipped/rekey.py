"""Gives traces of cuda.sm90_prefill the digest of its sources, which have been cut into more files since they were
measured:

    PYTHONPATH=. python experiments/2026-11-28_shipped/rekey.py base_kernels

The argument is kernels_cuda of revision c8c2880, renamed as ../2026-11-27_fused_tickets/measure.py says. Leaves without
a change unless the launcher is the same and so is the machine code of both kernels of every layer and config here.
"""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels_cuda import sm90_prefill
from kernels_triton.compile import disassemble
from workbench import registry
from workbench.environment import sources_digest
from workbench.problem import MoEShape
from workbench.trace import from_json
from workbench.variant import Config

PREFILL = "cuda.sm90_prefill"
TRACES = Path(__file__).with_name("h200_traces.jsonl.gz")


def main(package: str) -> None:
    older = importlib.import_module(f"{package}.sm90_prefill")
    for name in ("sm90_prefill", "tiled_inputs", "calls", "launch"):
        was, now = (Path(folder, f"{name}.py").read_text() for folder in (package, "kernels_cuda"))
        if was.replace(package, "kernels_cuda").replace('"base.sm90', '"cuda.sm90') != now:
            raise SystemExit(f"{name}.py has changed")

    def is_same(used: tuple[MoEShape, Config]) -> bool:
        shape, config = used
        pairs = [
            [getattr(each, name)(shape, config, False)[0] for each in (older, sm90_prefill)]
            for name in ("_compile_up", "_compile_down")
        ]
        return all(disassemble(one.path) == disassemble(other.path) for one, other in pairs)

    records = [json.loads(line) for line in gzip.decompress(TRACES.read_bytes()).splitlines()]
    ours = [record for record in records if record["key"]["variant"] == PREFILL]
    used = list(dict.fromkeys((key.shape, key.config) for key in (from_json(record).key for record in ours)))
    with ThreadPoolExecutor(2) as pool:
        same = list(pool.map(is_same, used))
    print(f"{sum(same)} of {len(same)} pairs of kernels are the same")
    if not all(same):
        raise SystemExit("nothing is changed")
    digest = sources_digest(registry.find(PREFILL))
    for record in ours:
        record["key"]["sources"] = digest
    with gzip.GzipFile(TRACES, "wb", 9, mtime=0) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


if __name__ == "__main__":
    main(sys.argv[1])
