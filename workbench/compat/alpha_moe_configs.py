"""The four tuning parameters of Alpha-MoE: what they mean to our kernel, and the files that hold the best for each M.

Two of our kernel's three parameters are among theirs, the third is not: how many CTAs share a work item. (block_n,
warp_n), which shape a tile inside theirs, say it here.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from workbench import registry
from workbench.compat.kernel import VARIANT, kernel
from workbench.errors import InputError, RecordError
from workbench.problem import MoEShape
from workbench.trace import Trace
from workbench.variant import Config

ALLOWED_BLOCK_M = range(8, 129, 8)
WARP_N_OF_BLOCK_N = {64: 4, 32: 8}
ALLOWED_STAGES = range(1, 6)
SPLIT_BLOCK_N = 32
"""The block_n with which a cluster of CTAs shares a work item."""


class BestConfig(TypedDict):
    """The tuning parameters of one batch size, as files hold them."""

    block_m: int
    block_n: int
    warp_n: int
    stages: int


def get_best_config(path: str | Path, num_tokens: int) -> BestConfig:
    """The tuning parameters for the file's batch size that is nearest to `num_tokens`; of two, the one named first.

    The file is one JSON object, {"8": {"block_m": 8, "block_n": 64, "warp_n": 4, "stages": 5}, ...}, as Alpha-MoE's
    tuner and `workbench tune --out-file` write it. Raises RecordError, with the path and the reason, when it is not.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"path: expected the path of a file of tuned configurations, got {path!r}")
    try:
        modified = Path(path).stat().st_mtime_ns
    except OSError as error:
        raise RecordError(path, f"expected a file of tuned configurations: {error.strerror}") from error
    return _nearest(Path(path), modified, num_tokens).copy()


def write_best_configs(path: Path, configs: Mapping[int, BestConfig]) -> None:
    """Write the file that `get_best_config` reads, whole or not at all: batch size -> tuning parameters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w") as file:
        json.dump({str(num_tokens): configs[num_tokens] for num_tokens in sorted(configs)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def tunable(shape: MoEShape, num_tokens: int) -> dict[Config, BestConfig]:
    """The configs of the kernel that a file can name and that are worth timing, with what the file says for each.

    The block sizes are those that the kernel itself would tune over, the ring as deep as it goes.
    """
    blocks = {config.integer("block_m"): None for config in registry.find(VARIANT).configs(shape, num_tokens)}
    found: dict[Config, BestConfig] = {}
    for block_m in blocks:
        for block_n, warp_n in WARP_N_OF_BLOCK_N.items():
            tuning = BestConfig(block_m=block_m, block_n=block_n, warp_n=warp_n, stages=max(ALLOWED_STAGES))
            found.setdefault(config_of(_as_called(shape), num_tokens, tuning), tuning)
    return found


def fastest(traces: Iterable[Trace]) -> dict[int, BestConfig]:
    """For each M the fastest by kernel time of the `tunable` configs that `traces` hold timed, as the file names it."""
    timed = [
        (one.key, one.timing.median_us) for one in traces if one.job == "bench" and one.scope == "kernel" and one.timing
    ]
    best: dict[int, BestConfig] = {}
    for key, _ in sorted(timed, key=lambda entry: entry[1]):
        best.setdefault(key.num_tokens, tunable(key.shape, key.num_tokens)[key.config])
    return best


def check_tuning(tuning: Mapping[str, object]) -> None:
    """InputError unless the four parameters are among those allowed."""
    block_m, block_n, warp_n, stages = (tuning[name] for name in BestConfig.__annotations__)
    if type(block_m) is not int or block_m not in ALLOWED_BLOCK_M:
        raise InputError(f"block_m: expected 8..128 in steps of 8, got {block_m!r}")
    if type(block_n) is not int or block_n not in WARP_N_OF_BLOCK_N:
        raise InputError(f"block_n: expected 64 or 32, got {block_n!r}")
    if type(warp_n) is not int or warp_n != WARP_N_OF_BLOCK_N[block_n]:
        raise InputError(f"warp_n: expected {WARP_N_OF_BLOCK_N[block_n]} with block_n={block_n}, got {warp_n!r}")
    if type(stages) is not int or stages not in ALLOWED_STAGES:
        raise InputError(f"stages: expected 1..5, got {stages!r}")


def _as_called(shape: MoEShape) -> MoEShape:
    """The shape as a call shows it: which experts are shared is not among the arguments."""
    return replace(shape, num_shared_experts=0, top_k=min(shape.top_k, shape.num_experts))


def config_of(shape: MoEShape, num_tokens: int, tuning: BestConfig) -> Config:
    """The kernel's config that the four parameters stand for."""
    return kernel().aligned_config(
        shape,
        num_tokens,
        tuning["block_m"],
        split_items=tuning["block_n"] == SPLIT_BLOCK_N,
        num_stages=tuning["stages"] + 1,
    )


@functools.lru_cache(maxsize=4096)
def _nearest(path: Path, modified: int, num_tokens: int) -> BestConfig:
    configs = _read(path, modified)
    return configs[min(configs, key=lambda measured: abs(measured - num_tokens))]


@functools.lru_cache(maxsize=16)
def _read(path: Path, modified: int) -> dict[int, BestConfig]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RecordError(path, f"expected a JSON object: {error}") from error
    if not isinstance(content, dict) or not content:
        raise RecordError(path, f"expected a JSON object of batch sizes, got {content!r}")
    configs: dict[int, BestConfig] = {}
    for batch_size, tuning in content.items():
        if not batch_size.isdecimal():
            raise RecordError(path, f"expected batch sizes as keys, got {batch_size!r}")
        if not isinstance(tuning, dict) or tuning.keys() != BestConfig.__annotations__.keys():
            raise RecordError(
                path, f"{batch_size}: expected {', '.join(BestConfig.__annotations__)} and no more, got {tuning!r}"
            )
        try:
            check_tuning(tuning)
        except InputError as error:
            raise RecordError(path, f"{batch_size}: {error}") from error
        configs[int(batch_size)] = BestConfig(**tuning)  # type: ignore[typeddict-item]
    return configs
