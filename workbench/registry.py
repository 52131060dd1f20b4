"""Which variants there are. Kernel packages are imported on first use, because importing one may need a compiler or a
GPU library that this machine lacks or has broken: one that fails is reported with its reason, and the others work.

Third parties register through the entry-point group `moe_workbench.variants`: each entry point names a module whose
import runs `@register`. So do the modules that the environment variable MOE_WORKBENCH_VARIANTS lists, for variants that
are not installed.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping
from importlib import metadata

from workbench.environment import settings
from workbench.errors import UnknownVariantError
from workbench.variant import Variant, registered

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "moe_workbench.variants"
BUILT_IN_MODULES = (
    "kernels_torch.loop",
    "kernels_torch.grouped",
    "kernels_triton.grouped",
    "kernels_cuda.sm90_fused",
    "kernels_cuda.sm90_stream",
    "kernels_cuda.sm90_prefill",
)


@functools.cache
def load_failures() -> Mapping[str, str]:
    """Import every variant module once; the modules that failed, with the reason."""
    failures: dict[str, str] = {}
    third_party = [point.value.partition(":")[0] for point in metadata.entry_points(group=ENTRY_POINT_GROUP)]
    for module in (*BUILT_IN_MODULES, *third_party, *settings().variant_modules):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken third-party module must not break the others
            failures[module] = f"{type(error).__name__}: {error}"
            logger.warning("variant module %s was skipped: %s", module, failures[module])
    return failures


def variants() -> Mapping[str, Variant]:
    """All variants that could be loaded, by name."""
    load_failures()
    return registered()


def find(name: str) -> Variant:
    """The variant called `name`; UnknownVariantError lists the names there are."""
    known = variants()
    if name not in known:
        skipped = "".join(f"; {module} was skipped: {reason}" for module, reason in load_failures().items())
        raise UnknownVariantError(f"variant: expected one of {', '.join(sorted(known))}, got {name!r}{skipped}")
    return known[name]
