"""Selection tables that come with the package, so that a layer is never slower without measuring first.

One file per device and shape, in `measured/<device>/`, in the form of selection.json, compressed; `workbench ship`
makes them. A layer reads the one of its shape. What was measured on the machine itself wins over it, M by M. Its
records are looked up like all others: one of kernels whose sources have changed since is a miss. So is, by default, one
of another driver or library; MOE_WORKBENCH_SHIPPED=device takes those, as a figure of the same kernels on the same
model of device is the best there is until `workbench tune` makes one here.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from workbench import table as tables
from workbench.environment import ShippedMode, shipped_mode
from workbench.errors import RecordError
from workbench.problem import MoEShape
from workbench.table import UNTIMED, UNVERIFIED, Candidate, Cell, Table
from workbench.trace import Environment, Status, Trace
from workbench.variant import Variant

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "measured"


def file_of(device: str, shape: MoEShape, folder: Path) -> Path:
    """Where in `folder` the table of `shape` lies that was measured on the device of that name."""
    unnamed = dataclasses.replace(shape, name="")
    return folder / device.replace(" ", "_") / f"{unnamed}.json.gz"


def write(
    traces: Iterable[Trace], environment: Environment, variants: Mapping[str, Variant], folder: Path
) -> list[Path]:
    """Write the table of each shape in `traces`, of what was measured in `environment`; the files written."""
    by_shape: dict[MoEShape, list[Trace]] = {}
    for one in traces:
        by_shape.setdefault(one.key.shape, []).append(one)
    written = []
    for shape, some in by_shape.items():
        table = tables.build(some, environment, variants)
        if table.traces:
            path = file_of(environment.device, shape, folder)
            tables.save(table, path)
            written.append(path)
    return written


def with_shipped(own: Table, shape: MoEShape, variants: Mapping[str, Variant]) -> Table:
    """`own`, and at each M of the cells of `shape` where it has no time, what is shipped.

    A candidate that is red in `own` stays red, whatever is shipped of it. RecordError when the file is malformed.
    """
    mode = shipped_mode()
    if mode == "off":
        return own
    cells = _cells(file_of(own.environment.device, shape, FOLDER), own.environment, mode, tuple(variants.items()))
    if not cells:
        return own
    merged = dict(own.cells)
    for cell, by_tokens in cells.items():
        mine = merged.get(cell, {})
        tokens = sorted(mine.keys() | by_tokens.keys())
        merged[cell] = {at: _merged(mine.get(at, ()), by_tokens.get(at, ())) for at in tokens}
    return dataclasses.replace(own, cells=merged)


def _merged(own: tuple[Candidate, ...], shipped: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    if any(one.timing is not None for one in own):
        return own
    red = [one for one in own if one.status not in (Status.PASSED, UNVERIFIED, UNTIMED)]
    decided = {one.identity for one in red}
    kept = [one for one in shipped if one.identity not in decided]
    return tuple(sorted([*red, *kept], key=lambda one: one.name))


@functools.lru_cache(maxsize=64)
def _cells(
    path: Path, here: Environment, mode: ShippedMode, variants: tuple[tuple[str, Variant], ...]
) -> Mapping[Cell, Mapping[int, tuple[Candidate, ...]]]:
    """What the file at `path` says here; nothing when there is none."""
    if not path.is_file():
        return {}
    made_in, traces = tables.read(path)
    if made_in.device != here.device:
        raise RecordError(path, f"made on another device: {made_in.device}, here {here.device}")
    if made_in != here:
        if mode != "device":
            _say(
                f"shipped selection tables not used: made with {tables.differences(made_in, here)}; "
                "MOE_WORKBENCH_SHIPPED=device takes them all the same"
            )
            return {}
        _say(f"shipped selection tables used, though made with {tables.differences(made_in, here)}")
    built = tables.build(traces, made_in, dict(variants))
    return {
        cell: {
            at: tuple(dataclasses.replace(one, shipped=True) for one in candidates)
            for at, candidates in by_tokens.items()
        }
        for cell, by_tokens in built.cells.items()
    }


@functools.cache
def _say(message: str) -> None:
    """Log a message once: the layers of a model are many and alike."""
    logger.warning(message)
