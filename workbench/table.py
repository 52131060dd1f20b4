"""The selection table: of all traces, those that decide in one environment, sorted into cells.

The table *is* those traces and keeps no figure of its own, so that every choice made from it can be explained from it.
A record of another environment, or of sources that have changed since, is a miss and left out.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.environment import sources_digest
from workbench.errors import InputError, RecordError
from workbench.problem import InputKind, MoEShape
from workbench.strict_json import decode, encode
from workbench.trace import Environment, Key, Scope, Status, Timing, Trace, from_json, to_json
from workbench.variant import Config, Variant

VERSION = 1
SELECTION_FILE = "selection.json"
"""Its name in a results folder."""
SCOPES: tuple[Scope, ...] = ("kernel", "layer")
UNVERIFIED = "unverified"
UNTIMED = "untimed"


@dataclass(frozen=True)
class Cell:
    """What a choice depends on besides M and the environment."""

    shape: MoEShape
    routing: str
    input_kind: InputKind
    scope: Scope
    dropped: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One (variant, config) at one M, and whether it may be chosen."""

    variant: str
    config: Config
    status: str
    """`passed`, the status that rules it out, `unverified`, or `untimed`."""
    timing: Timing | None = None
    first_config: bool = False
    """Whether `config` is the one the variant uses untuned."""
    message: str = ""
    shipped: bool = False
    """Whether the figure came with the package (shipped.py) and was not made here."""

    @property
    def name(self) -> str:
        return f"{self.variant} [{self.config}]"

    @property
    def identity(self) -> tuple[str, Config]:
        return self.variant, self.config


@dataclass(frozen=True)
class Table:
    """The traces that decide in one environment, sorted into cells: cell -> M -> candidates."""

    environment: Environment
    traces: tuple[Trace, ...]
    cells: Mapping[Cell, Mapping[int, tuple[Candidate, ...]]]


def build(traces: Iterable[Trace], environment: Environment, variants: Mapping[str, Variant]) -> Table:
    """The table that `traces` make in `environment`.

    A trace of another environment, of other sources than a variant has now, or of a variant that is not there, is a
    miss and left out. Of two measurements of one thing the later counts; the order of `traces` does not matter.
    """
    digests = {name: sources_digest(variant) for name, variant in variants.items()}
    latest: dict[tuple[object, ...], Trace] = {}
    for trace in sorted(traces, key=lambda trace: (trace.created, repr(trace))):
        key = trace.key
        if trace.job not in ("verify", "bench") or key.environment != environment:
            continue
        if digests.get(key.variant) != key.sources:
            continue
        seed = trace.seed if trace.job == "verify" else None  # wrong on one batch is wrong, whatever others show
        latest[trace.job, trace.scope, key, seed] = trace
    deciding = tuple(latest.values())
    return Table(environment, deciding, _cells(deciding, variants))


def _cells(traces: Sequence[Trace], variants: Mapping[str, Variant]) -> dict[Cell, dict[int, tuple[Candidate, ...]]]:
    verifications = [trace for trace in traces if trace.job == "verify"]
    verified = {trace.key for trace in verifications}
    red = {_any_input(trace.key): trace for trace in verifications if trace.status is not Status.PASSED}
    timed = {(trace.key, trace.scope): trace for trace in traces if trace.job == "bench"}

    @functools.cache
    def first_config(variant: str, shape: MoEShape, num_tokens: int) -> Config:
        return next(iter(variants[variant].configs(shape, num_tokens)))

    def candidate(key: Key, scope: Scope) -> Candidate:
        fault = red.get(_any_input(key))
        bench = timed.get((key, scope))
        status: str = Status.PASSED
        if fault is not None:
            status, message = fault.status, fault.message
        elif key not in verified:
            status, message = UNVERIFIED, "no verification of these sources is recorded"
        elif bench is None:
            status, message = UNTIMED, "verified, not timed"
        else:
            status, message = bench.status, bench.message
        return Candidate(
            variant=key.variant,
            config=key.config,
            status=status,
            timing=bench.timing if bench is not None and status == Status.PASSED else None,
            first_config=key.config == first_config(key.variant, key.shape, key.num_tokens),
            message=message,
        )

    cells: dict[Cell, dict[int, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for key in {trace.key for trace in traces}:
        for scope in SCOPES:
            cell = Cell(key.shape, key.routing, key.input_kind, scope, key.dropped)
            cells[cell][key.num_tokens].append(candidate(key, scope))
    return {
        cell: {
            num_tokens: tuple(sorted(found, key=lambda candidate: candidate.name))
            for num_tokens, found in sorted(by_tokens.items())
        }
        for cell, by_tokens in cells.items()
    }


def _any_input(key: Key) -> Key:
    """The key with its input kind set aside: a kernel wrong for quantised tokens is not trusted with bf16 ones."""
    return dataclasses.replace(key, input_kind="bf16")


def save(table: Table, path: Path) -> None:
    """Write the table to `path`, whole or not at all; compressed when its name ends with .gz."""
    content = {
        "version": VERSION,
        "environment": encode(table.environment),
        "traces": [to_json(trace) for trace in table.traces],
    }
    compressed = path.suffix == ".gz"
    written = json.dumps(content, indent=None if compressed else 1, allow_nan=False).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        file.write(gzip.compress(written, mtime=0) if compressed else written)  # equal tables are equal files
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load(path: Path, environment: Environment, variants: Mapping[str, Variant]) -> Table:
    """The table at `path`, made in `environment`.

    RecordError when it is missing, malformed, truncated, of another version or of another environment.
    """
    made_in, traces = read(path)
    if made_in != environment:
        raise RecordError(path, f"made in another environment: {differences(made_in, environment)}")
    return build(traces, environment, variants)


def differences(there: Environment, here: Environment) -> str:
    """What differs between the environment of a record and this one, in words."""
    recorded, present = encode(there), encode(here)
    differing = [name for name in present if recorded[name] != present[name]]
    return "; ".join(f"{name} {recorded[name]!r}, here {present[name]!r}" for name in differing)


def read(path: Path) -> tuple[Environment, list[Trace]]:
    """The environment that the table at `path` was made in, and its traces.

    RecordError when it is missing, malformed, truncated or of another version.
    """
    try:
        written = path.read_bytes()
        content = json.loads(gzip.decompress(written) if path.suffix == ".gz" else written)
    except (EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        raise RecordError(path, f"not a selection table, or truncated: {error}") from error
    except OSError as error:
        raise RecordError(path, f"not readable: {error.strerror}") from error
    if not isinstance(content, dict) or set(content) != {"version", "environment", "traces"}:
        raise RecordError(path, "expected an object with version, environment and traces")
    if content["version"] != VERSION:
        raise RecordError(path, f"expected version {VERSION}, got {content['version']!r}")
    try:
        made_in = decode(Environment, content["environment"], "environment")
        if not isinstance(content["traces"], list):
            raise InputError(f"traces: expected a list, got {content['traces']!r}")
        traces = [from_json(record) for record in content["traces"]]
    except InputError as error:
        raise RecordError(path, str(error)) from error
    return made_in, traces
