"""The traces that experiments keep. Scripts find it with the repository's root on PYTHONPATH."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable
from pathlib import Path

from workbench.trace import Status, Trace, from_json

Times = dict[tuple[str, int, str, str], float]
"""us by shape, M, scope and variant."""


def read(path: Path) -> list[Trace]:
    """Those of a traces.jsonl, or of one that is compressed (.gz), in the order written."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [from_json(json.loads(line)) for line in text.splitlines()]


def fastest_us(traces: Iterable[Trace]) -> Times:
    """Of what passed, the least median of any config."""
    found: Times = {}
    for one in traces:
        if one.timing and one.status is Status.PASSED:
            key = (str(one.key.shape), one.key.num_tokens, str(one.scope), one.key.variant)
            found[key] = min(found.get(key, math.inf), one.timing.median_us)
    return found
