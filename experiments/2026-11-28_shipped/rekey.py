"""Gives traces of cuda.sm90_stream the digest of its sources, in which one name has changed since these were measured:

    PYTHONPATH=. python experiments/2026-11-28_shipped/rekey.py base_kernels

The argument is kernels_cuda of revision 27f12f4, renamed as ../2026-11-27_fused_tickets/measure.py says. Leaves without
a change unless the code of all sources is the same but for that name, which stands nowhere else, and so is the machine
code of every kernel that tests/test_sm90_stream.py compiles: all heights, parts and forms.
"""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels_cuda import sm90_stream
from kernels_cuda.sm90 import NUM_SMS
from kernels_cuda.sm90_stream import FORMS, SM90Stream
from kernels_cuda.tiled_inputs import Takes
from kernels_triton.compile import disassemble
from workbench import registry
from workbench.environment import sources_digest
from workbench.problem import MoEShape
from workbench.source_code import code
from workbench.variant import Config

sys.path.append("tests")
from test_sm90_stream import compiled_cases

STREAM = "cuda.sm90_stream"
BEFORE, NOW = b"kMaxRowsAtOnce", b"kRowsAtOnce"
TRACES = Path(__file__).with_name("h200_traces.jsonl.gz")


def main(package: str) -> None:
    older = importlib.import_module(f"{package}.sm90_stream")
    was, now = Path(package), Path("kernels_cuda")
    for path in SM90Stream().sources():
        if path.suffix not in (".cu", ".cuh"):
            continue
        before = code(was / path.relative_to(now.resolve()))
        if NOW in before or before.replace(BEFORE, NOW) != code(path):
            raise SystemExit(f"{path.name}: more than the name has changed")

    def is_same(kernel: tuple[MoEShape, Config, Takes]) -> bool:
        shape, config, takes = kernel
        one, other = (each._compile(config, shape, NUM_SMS, False, takes)[0] for each in (older, sm90_stream))
        return disassemble(one.path) == disassemble(other.path)

    kernels = [(shape, config, takes) for shape, config in compiled_cases() for takes in FORMS]
    with ThreadPoolExecutor(2) as pool:
        same = list(pool.map(is_same, kernels))
    print(f"{sum(same)} of {len(same)} kernels are the same")
    if not all(same):
        raise SystemExit("nothing is changed")
    digest, lines = sources_digest(registry.find(STREAM)), []
    for line in gzip.decompress(TRACES.read_bytes()).splitlines():
        record = json.loads(line)
        if record["key"]["variant"] == STREAM:
            record["key"]["sources"] = digest
        lines.append(json.dumps(record))
    with gzip.GzipFile(TRACES, "wb", 9, mtime=0) as file:
        file.write(("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1])
