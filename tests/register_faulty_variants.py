"""What MOE_WORKBENCH_VARIANTS names in the tests of the worker: its import, in the child, registers faulty variants."""

from __future__ import annotations

from faulty_variants import Compiled, Faulty, Interpreted, Unpreparable, Unsupporting

from workbench.variant import register

for variant in (Faulty, Unpreparable, Unsupporting, Interpreted, Compiled):
    register(variant)
