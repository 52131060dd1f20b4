"""Run a file of tests/interpreted in a child process with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"


def assert_passes_interpreted(file_name: str) -> None:
    """Run every test of `file_name`; an AssertionError carries the child's report, or the signal that ended it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", FOLDER / file_name]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        command, env=environment, cwd=FOLDER.parent.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert child.returncode == 0, f"exit code {child.returncode}\n{child.stdout}\n{child.stderr}"
    assert " passed" in child.stdout
