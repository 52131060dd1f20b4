"""How the experiments time a call by itself. `workbench.timing`, which times candidates against each other, is what the
comparisons use. Scripts find it with the repository's root on PYTHONPATH."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

FLUSH_BYTES = 384 << 20


def captured(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of calls 0..calls-1, after one outside of it; replayed once."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    return graph


def graph_difference(
    call: Callable[[int], object], device: torch.device | str = "cuda:0", *, calls: int = 8, samples: int = 10
) -> float:
    """Microseconds per call on a cold L2: a graph of flushes and calls less a graph of flushes, the median of them.

    call    enqueues the call of that number, 0..calls-1
    """
    memory = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    with_calls = captured(lambda i: (memory.sum(), call(i)), calls)
    without = captured(lambda _: memory.sum(), calls)
    differences = []
    for _ in range(samples):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        with_calls.replay()
        marks[1].record()
        without.replay()
        marks[2].record()
        marks[2].synchronize()
        differences.append(marks[0].elapsed_time(marks[1]) - marks[1].elapsed_time(marks[2]))
    return statistics.median(differences) * 1e3 / calls
