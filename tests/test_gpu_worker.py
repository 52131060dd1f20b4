"""A kernel may break the device's context or never end: the sweep says so of its variant, and measures the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.problem import MoEShape, Workload
from workbench.timing import Effort
from workbench.trace import Status
from workbench.variant import Config
from workbench.worker import Task, run

pytestmark = pytest.mark.gpu

WORKLOAD = Workload(MoEShape(num_experts=4, hidden_size=128, intermediate_size=128, top_k=2), num_tokens=5)
EFFORT = Effort(num_samples=6, calls_per_sample=3)
TIME_LIMIT_S = 30.0


@pytest.fixture(autouse=True)
def _third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_VARIANTS", "register_faulty_variants")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_an_illegal_address_is_a_crash_and_an_endless_kernel_a_hang() -> None:
    good = ("torch.faulty", Config())
    candidates = (
        ("torch.faulty", Config(fault="illegal address")),
        good,
        ("torch.faulty", Config(fault="endless kernel")),
        ("torch.loop", Config()),
    )
    traces = list(run([Task("verify", "cuda", WORKLOAD, candidates)], time_limit_s=TIME_LIMIT_S, effort=EFFORT))
    assert [trace.status for trace in traces] == [Status.CRASHED, Status.PASSED, Status.HUNG, Status.PASSED]
    assert "illegal memory access" in traces[0].message
    assert traces[2].message.startswith("no answer within 30 s")
