"""The main job on a machine without a GPU: each backend as far as it goes, and the report says how far."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded import CPU, HERE, SHAPE, Worker, named, variant

from workbench import compare, registry, worker
from workbench.doctor import Ability
from workbench.problem import Workload
from workbench.sweep import Session, open_session
from workbench.timing import QUICK
from workbench.trace import Status, Trace
from workbench.variant import CompileReport

LOOP = variant("torch.loop")
GROUPED = variant("torch.grouped", 6)
TRITON = variant("triton.grouped", 6)
TRITON.backend = "triton"
CUDA = variant("cuda.sm90_fused", 6)
CUDA.backend = "cuda"
VARIANTS = named(CUDA, TRITON, GROUPED, LOOP)
WORKLOADS = [Workload(SHAPE, 1), Workload(SHAPE, 8)]


class CompilingWorker(Worker):
    """Compiles as well: every kernel is clean."""

    def run(self, tasks, **options):
        for task in tasks:
            if task.job != "compile":
                yield from super().run([task], **options)
                continue
            self.tasks.append(task)
            for name, config in task.candidates:
                of = worker_key(name, config, task.workload)
                yield Trace("compile", Status.PASSED, of, compiled=CompileReport("fused", config, 168, 0, 0, 0, 100))


def worker_key(name, config, workload):
    from workbench.verify import key_of

    return key_of(VARIANTS[name], config, workload, HERE)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """torch.grouped is faster than torch.loop, and its config 2 is its fastest."""
    fake = CompilingWorker(
        lambda name, config: 50.0 if name == "torch.loop" else 10.0 + 5 * abs(config.integer("block_m") - 2)
    )
    monkeypatch.setattr(worker, "run", fake.run)
    monkeypatch.setattr(registry, "variants", lambda: VARIANTS)
    monkeypatch.setattr(registry, "find", VARIANTS.__getitem__)
    return fake


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return open_session(CPU, tmp_path / "traces.jsonl", time_limit_s=1.0, effort=QUICK)


def jobs_of(fake: Worker, name: str) -> set[str]:
    return {task.job for task in fake.tasks for candidate, _ in task.candidates if candidate == name}


def test_without_a_gpu_each_backend_goes_as_far_as_it_can(fake: Worker, session: Session) -> None:
    made = compare.compare(session, WORKLOADS, list(VARIANTS), 4)
    assert jobs_of(fake, "torch.grouped") == {"verify", "tune", "bench"}
    assert jobs_of(fake, "torch.loop") == {"verify", "bench"}
    assert jobs_of(fake, "triton.grouped") == {"verify"}
    assert jobs_of(fake, "cuda.sm90_fused") == {"compile"}
    assert {name: used for name, (used, _) in made.abilities.items()} == {
        "cuda.sm90_fused": Ability.COMPILE_ONLY,
        "triton.grouped": Ability.INTERPRETED,
        "torch.grouped": Ability.NATIVE,
        "torch.loop": Ability.NATIVE,
    }


def test_both_kinds_of_input_are_verified_and_the_tuned_config_is_timed_beside_the_default(
    fake: Worker, session: Session
) -> None:
    compare.compare(session, WORKLOADS, list(VARIANTS), 4)
    kinds = {task.workload.input_kind for task in fake.tasks if task.job == "verify"}
    assert kinds == {"bf16", "fp8"}
    timed = {
        (task.workload.num_tokens, name, config["block_m"])
        for task in fake.tasks
        if task.job == "bench"
        for name, config in task.candidates
    }
    expected = {("torch.grouped", 0), ("torch.grouped", 2), ("torch.loop", 0)}
    assert timed == {(m, *one) for m in (1, 8) for one in expected}


def test_the_real_layers_are_compiled_whatever_shape_is_compared(fake: Worker, session: Session) -> None:
    compare.compare(session, WORKLOADS, list(VARIANTS), 4)
    shapes = {str(task.workload.shape) for task in fake.tasks if task.job == "compile"}
    assert shapes == {str(SHAPE), *compare.GPU_SHAPES}


def test_a_shape_is_done_with_before_the_next_begins(fake: Worker, session: Session) -> None:
    other = Workload(compare.shape_of_alias("tiny_shared"), 8)
    compare.compare(session, [WORKLOADS[0], other, WORKLOADS[1]], ["torch.loop"], 1)
    for job in ("verify", "bench"):
        shapes = [str(task.workload.shape) for task in fake.tasks if task.job == job]
        assert shapes == sorted(shapes, key=shapes.index)


def test_a_comparison_writes_its_table_selection_and_plots(fake: Worker, session: Session, tmp_path: Path) -> None:
    made = compare.compare(session, WORKLOADS, list(VARIANTS), 4)
    files = compare.save(made, session, tmp_path / "out")
    assert {"table.md", "selection.json"} < {file.name for file in files}
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| cuda.sm90_fused | compile only | no GPU: compiled for sm_90a, not run |" in text
    assert "| torch.grouped, tuned |" in text
    (kernel_line,) = [line for line in text.splitlines() if line.startswith("| 8 |") and "verified" in line][:1]
    assert "10.0" in kernel_line
