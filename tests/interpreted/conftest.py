"""Tests of Triton kernels on the CPU. They need a process of their own, with TRITON_INTERPRET=1 set before Triton is
imported, because the interpreter replaces Triton's compiler, and a wrong access in it is a segmentation fault:

    TRITON_INTERPRET=1 pytest tests/interpreted

The tests in the folder above start that process; in any other one nothing here is collected.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
