"""One measurement = one Trace: a line of a JSONL file, with all that could have changed it.

A Trace is never edited. A record is looked up by its whole `Key` (plain equality); one whose key differs in anything is
a miss. Files only grow, one whole line at a time, so that a sweep that dies loses nothing but the line it was writing.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from workbench.errors import InputError, RecordError
from workbench.problem import InputKind, MoEShape
from workbench.strict_json import decode, encode
from workbench.variant import CompileReport, Config

SCHEMA = 1
HOW_TO_MEND = "`workbench recover` cuts it off"

Job = Literal["verify", "bench", "tune", "compile"]
Scope = Literal["kernel", "layer"]


class Status(StrEnum):
    """How a measurement ended; it decides which parts of the Trace are there."""

    PASSED = "passed"
    WRONG = "wrong"  # ran to its end, and the output does not match the reference
    FAILED = "failed"  # raised a Python exception
    CRASHED = "crashed"  # the child process died, or the device reported a fault
    HUNG = "hung"  # no answer within the time limit; the child was killed
    UNSUPPORTED = "unsupported"  # the variant refused the shape or device, with a reason


@dataclass(frozen=True)
class Environment:
    """Everything outside the repository that can change a measurement."""

    device: str
    driver: str
    cuda: str
    torch: str
    triton: str
    cupy: str


@dataclass(frozen=True)
class Key:
    """What was measured, on what, with which sources."""

    variant: str
    config: Config
    sources: str
    shape: MoEShape
    num_tokens: int
    routing: str
    dropped: float
    input_kind: InputKind
    environment: Environment


@dataclass(frozen=True)
class Accuracy:
    """The output against the fp32 reference."""

    rel_err: float
    """||out - ref|| / ||ref||, Frobenius norms."""
    max_abs_err: float
    cosine: float
    tolerance: float


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median of the samples and the 95 % confidence interval of that median."""

    median_us: float
    low_us: float
    high_us: float
    num_samples: int
    num_routings: int
    graph: bool
    """Whether calls were replayed from a CUDA graph."""
    sm_clock_mhz: int = 0
    throttle_reasons: str = ""


@dataclass(frozen=True)
class Trace:
    """One measurement and how it ended."""

    job: Job
    status: Status
    key: Key
    seed: int = 0
    scope: Scope | None = None
    accuracy: Accuracy | None = None
    timing: Timing | None = None
    floor_us: float | None = None
    compiled: CompileReport | None = None
    message: str = ""
    created: str = ""

    def __post_init__(self) -> None:
        if (
            self.job in ("bench", "tune")
            and self.status is Status.PASSED
            and (self.timing is None or self.scope is None)
        ):
            raise InputError(f"trace: a passed {self.job} needs a timing and a scope")
        if self.job == "verify" and self.status in (Status.PASSED, Status.WRONG) and self.accuracy is None:
            raise InputError(f"trace: a verify that ended {self.status} needs an accuracy")
        if self.status not in (Status.PASSED,) and not self.message:
            raise InputError(f"trace: a measurement that ended {self.status} needs a message")


def now() -> str:
    """The time as `Trace.created` holds it: UTC, whole seconds, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(trace: Trace) -> dict[str, Any]:
    """`trace` as one JSON object; its "schema" says which version of this file wrote it."""
    return {"schema": SCHEMA, **encode(trace)}


def from_json(record: Any) -> Trace:
    """The Trace that `to_json` made `record` from.

    Raises InputError for another schema, a missing or unknown field, a wrong type, or a Trace that cannot be.
    """
    if not isinstance(record, dict):
        raise InputError(f"trace: expected an object, got {record!r}")
    schema = record.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise InputError(f"trace.schema: expected {SCHEMA}, got {schema!r}")
    return decode(Trace, {name: value for name, value in record.items() if name != "schema"}, "trace")


def append(path: str | Path, trace: Trace) -> None:
    """Add `trace` to the file as one line that is on disk when this returns. Makes the file and its folder.

    Raises RecordError when the file's last line is torn, as a crash while writing leaves it; see `recover`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(to_json(trace), allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            raise RecordError(path, f"the last line is torn: expected a line break at its end; {HOW_TO_MEND}")
        file.write(line.encode())
        os.fsync(descriptor)


def read(path: str | Path) -> list[Trace]:
    """All traces of the file, in the order written; a file that is not there holds none.

    Raises RecordError, `path:line: reason`, at the first line that is not a whole Trace of this schema.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        torn = f"the last line is torn: expected a line break at its end; {HOW_TO_MEND}"
        raise RecordError(f"{path}:{len(lines) + 1}", torn)
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def recover(path: str | Path) -> str:
    """Cut a torn last line off the file, so that a sweep can resume; returns what was cut, "" when nothing was."""
    path = Path(path)
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return content[whole:].decode(errors="replace")


def _parse(path: Path, number: int, line: bytes) -> Trace:
    try:
        return from_json(json.loads(line))
    except (ValueError, UnicodeDecodeError) as error:  # json.JSONDecodeError and InputError are ValueErrors
        raise RecordError(f"{path}:{number}", str(error)) from error
