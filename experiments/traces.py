"""The traces that experiments keep. Scripts find it with the repository's root on PYTHONPATH."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from workbench.trace import Trace, from_json


def read(path: Path) -> list[Trace]:
    """Those of a traces.jsonl, or of one that is compressed (.gz), in the order written."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [from_json(json.loads(line)) for line in text.splitlines()]
