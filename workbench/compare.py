"""The main job: verify, tune, bench, select and report, for every shape and M.

On a GPU the variants that run there are verified with bf16 and with quantised tokens, searched briefly, and timed. On a
machine without one it is real too, as far as such a machine goes: torch variants are verified and timed, Triton
variants verified in the interpreter, CUDA variants compiled for sm_90a; the report says which is which.

Each phase goes through all shapes and M before the next begins, so that its process makes a shape's weights once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench import registry, report, table
from workbench.doctor import Ability, abilities
from workbench.models import shape_of_alias
from workbench.precompile import Request, precompile
from workbench.problem import InputKind, MoEShape, Workload
from workbench.sweep import Session, measure, task_of, unrecorded
from workbench.table import Table
from workbench.trace import Trace
from workbench.tune import defaults, space, tune
from workbench.worker import Task

GPU_SHAPES = ("dsv3_tp16", "dsv3_tp8", "qwen3next_tp4")
GPU_TOKENS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CPU_SHAPES = ("tiny", "tiny_shared")
CPU_TOKENS = (1, 2, 8, 33, 128)


@dataclass(frozen=True)
class Comparison:
    """What was measured or found, and what follows from it."""

    traces: tuple[Trace, ...]
    table: Table
    abilities: Mapping[str, tuple[Ability, str]]
    """How each variant was used, and why not better."""


def compare(
    session: Session, workloads: Sequence[Workload], variants: Sequence[str], configs: int | None
) -> Comparison:
    """Put `variants` through everything this machine can do, with up to `configs` configs each (None: all).

    With more than one config each variant's first pass picks the one that is then timed beside its default.
    """
    how = abilities({name: registry.find(name) for name in variants}, session.device)

    def able(wanted: Ability) -> list[str]:
        return [name for name in variants if how[name][0] is wanted]

    native, interpreted = able(Ability.NATIVE), able(Ability.INTERPRETED)
    # With the other kind of input the defaults alone are verified: what is timed is checked once more by the bench.
    by_shape = [workload for shape in _shapes(workloads) for workload in workloads if workload.shape == shape]
    other_input = [dataclasses.replace(workload, input_kind=_other(workload.input_kind)) for workload in by_shape]
    to_verify = [
        task_of("verify", session, workload, candidates)
        for own, other in zip(by_shape, other_input, strict=True)
        for workload, candidates in ((own, space(native, own, configs)), (other, defaults(native, other)))
    ]
    to_interpret = [
        task_of("verify", session, workload, defaults(interpreted, workload)) for workload in by_shape + other_input
    ]
    to_compile = _compile_tasks(session, workloads, able(Ability.COMPILE_ONLY))
    precompile(
        Request(name, task.workload.shape, config)
        for task in (*to_verify, *to_compile)
        for name, config in unrecorded(session, task)
        if registry.find(name).backend != "torch"
    )
    traces = measure(session, "verify", to_verify)
    traces += measure(session, "verify in the interpreter", to_interpret)
    traces += tune(session, by_shape, native, limit=configs, keep=1)
    traces += measure(session, "compile for sm_90a", to_compile)
    made = tuple(dict.fromkeys(traces))
    return Comparison(made, table.build(made, session.environment, registry.variants()), how)


def _shapes(workloads: Sequence[Workload]) -> list[MoEShape]:
    return list(dict.fromkeys(workload.shape for workload in workloads))


def _other(input_kind: InputKind) -> InputKind:
    return "fp8" if input_kind == "bf16" else "bf16"


def _compile_tasks(session: Session, workloads: Sequence[Workload], variants: Sequence[str]) -> list[Task]:
    """One task per shape, of the default configs of all M; the real layers besides the shapes asked for.

    What is compiled does not depend on M, so a task stands for all M of its shape.
    """
    if not variants:
        return []
    tokens = sorted({workload.num_tokens for workload in workloads} | set(GPU_TOKENS))
    shapes = dict.fromkeys([*_shapes(workloads), *map(shape_of_alias, GPU_SHAPES)])
    tasks = []
    for shape in shapes:
        at_all_tokens = [defaults(variants, Workload(shape, num_tokens)) for num_tokens in tokens]
        distinct = tuple(dict.fromkeys(candidate for some in at_all_tokens for candidate in some))
        tasks.append(task_of("compile", session, Workload(shape, max(tokens)), distinct))
    return tasks


def save(comparison: Comparison, session: Session, folder: Path, baseline: str | None = None) -> list[Path]:
    """Write the selection table, the report and its plots into `folder`; the files written."""
    table.save(comparison.table, folder / table.SELECTION_FILE)
    written = report.save(
        folder, comparison.table, comparison.traces, registry.variants(), session.device, comparison.abilities, baseline
    )
    return [folder / table.SELECTION_FILE, *written]
