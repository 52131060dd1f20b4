"""Compile ahead, in several processes, the kernels that a sweep will run one after another.

Only one process may use the GPU while kernels are timed, and on a first run it would wait for compilers most of the
time. What is compiled here lands in the compilers' own caches on disk. A kernel that does not compile is passed over:
the sweep meets it again, and records why.

    python -m workbench.precompile     one such process: a Request as JSON per line of stdin
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from workbench import registry
from workbench.errors import WorkbenchError
from workbench.problem import MoEShape
from workbench.strict_json import decode, encode
from workbench.variant import Config

logger = logging.getLogger(__name__)

CORES_PER_PROCESS = 1.25
"""A process compiles on one core; its assembler runs beside it for a part of the time."""


@dataclass(frozen=True)
class Request:
    """One config of one variant to compile for a shape."""

    variant: str
    shape: MoEShape
    config: Config


def precompile(requests: Iterable[Request]) -> None:
    """Returns when every request was compiled or has failed. An exception, as from Ctrl-C, ends the processes."""
    wanted = list(dict.fromkeys(requests))
    num_processes = min(len(wanted), max(1, round((os.cpu_count() or 1) / CORES_PER_PROCESS)))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for first in range(num_processes):
            process = subprocess.Popen(
                [sys.executable, "-m", "workbench.precompile"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            processes.append(process)
            assert process.stdin is not None
            lines = [json.dumps(encode(request)).encode() + b"\n" for request in wanted[first::num_processes]]
            process.stdin.writelines(lines)
            process.stdin.close()
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Serve the requests on stdin."""
    for line in sys.stdin:
        request = decode(Request, json.loads(line))
        try:
            registry.find(request.variant).compile(request.shape, [request.config])
        except WorkbenchError as error:
            logger.warning("%s %s was not compiled ahead: %s", request.variant, request.config, error)


if __name__ == "__main__":
    main()
