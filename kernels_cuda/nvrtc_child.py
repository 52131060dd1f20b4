"""The compiler's process: reads {source, options, cubin} as JSON on stdin, writes the cubin, prints NVRTC's log.

Exits with 1 when the source does not compile. It is run as a file, so it imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc


def check(answer: tuple[Any, ...]) -> Any:
    """The value of an NVRTC call, or an exit with its error."""
    if answer[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        sys.exit(nvrtc.nvrtcGetErrorString(answer[0])[1].decode())
    return answer[1] if len(answer) > 1 else None


def main() -> None:
    request = json.load(sys.stdin)
    source = Path(request["source"])
    program = check(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, None, None))
    options = [option.encode() for option in request["options"]]
    (outcome,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
    check(nvrtc.nvrtcGetProgramLog(program, log))
    print(log.rstrip(b"\0").decode().strip())
    check((outcome,))
    cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, cubin))
    Path(request["cubin"]).write_bytes(cubin)


if __name__ == "__main__":
    main()
