"""What is encoded comes back equal, through JSON text; what does not fit is refused. See also test_trace.py."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.problem import MoEShape, RoutingLaw, Workload
from workbench.strict_json import decode, encode
from workbench.timing import NORMAL, Effort
from workbench.variant import Config
from workbench.worker import Task

SHAPE = MoEShape(257, 7168, 128, 9, 1, name="dsv3_tp16")
VALUES = st.one_of(st.integers(), st.booleans(), st.text(max_size=5))
CONFIGS = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=4).map(
    lambda values: Config(**values)
)


@given(
    candidates=st.lists(st.tuples(st.text(max_size=8), CONFIGS), max_size=3, unique=True),
    law=st.one_of(st.just(RoutingLaw()), st.floats(0.1, 9).map(lambda exponent: RoutingLaw("zipf", exponent))),
    dropped=st.floats(0, 1),
)
def test_a_task_comes_back_equal(candidates: list[tuple[str, Config]], law: RoutingLaw, dropped: float) -> None:
    task = Task("tune", "cuda:1", Workload(SHAPE, 64, law, 3, "fp8", dropped), tuple(candidates), ("layer",))
    assert decode(Task, json.loads(json.dumps(encode(task), allow_nan=False))) == task


def test_an_unlimited_effort_comes_back_unlimited() -> None:
    effort = Effort(num_samples=3)
    text = json.dumps(encode(effort), allow_nan=False)
    assert decode(Effort, json.loads(text)) == effort
    assert decode(Effort, json.loads(text)).seconds_per_candidate == math.inf


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"candidates": {}}, r"task.candidates: expected a list, got \{\}"),
        ({"candidates": [["torch.loop"]]}, r"task.candidates\[0\]: expected 2 items, got 1"),
        ({"candidates": [[1, {}]]}, r"task.candidates\[0\]\[0\]: expected str, got 1"),
        ({"scopes": ["kernel", "all"]}, r"task.scopes\[1\]: expected one of kernel, layer, got 'all'"),
    ],
)
def test_the_place_of_what_does_not_fit_is_named(change: dict[str, object], complaint: str) -> None:
    record = encode(Task("bench", "cpu", Workload(SHAPE, 1), (("torch.loop", Config()),)))
    with pytest.raises(InputError, match=complaint):
        decode(Task, record | change, "task")


def test_a_whole_number_serves_as_a_float_and_not_the_other_way() -> None:
    record = encode(NORMAL)
    assert decode(Effort, record | {"seconds_per_candidate": 1}).seconds_per_candidate == 1.0
    with pytest.raises(InputError, match=r"record.num_samples: expected int, got 3.0"):
        decode(Effort, record | {"num_samples": 3.0})
