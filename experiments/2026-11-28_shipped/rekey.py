"""Gives traces of cuda.sm90_prefill the digest of its sources, which have been changed since they were measured, where
the machine code is what it was, and leaves out those where it is not:

    PYTHONPATH=. python experiments/2026-11-28_shipped/rekey.py base_kernels

The argument is kernels_cuda as measured, renamed as ../2026-11-27_fused_tickets/measure.py says. Nothing is changed if
the launcher is not the same.
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
        same = dict(zip(used, pool.map(is_same, used), strict=True))
    print(f"{sum(same.values())} of {len(same)} pairs of kernels are the same; the others:")
    for (shape, config), unchanged in same.items():
        if not unchanged:
            print(f"  {shape} {config}")
    digest, kept = sources_digest(registry.find(PREFILL)), []
    for record in records:
        key = from_json(record).key
        if key.variant == PREFILL:
            if not same[key.shape, key.config]:
                continue
            record["key"]["sources"] = digest
        kept.append(record)
    print(f"{len(kept)} of {len(records)} traces are kept")
    with TRACES.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write("".join(json.dumps(record) + "\n" for record in kept).encode())


if __name__ == "__main__":
    main(sys.argv[1])
