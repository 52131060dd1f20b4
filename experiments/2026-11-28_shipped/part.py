"""A part of the plan of `workbench ship`, for one of several GPUs at a time:

    for i in 0 1; do CUDA_VISIBLE_DEVICES=$i PYTHONPATH=. python experiments/2026-11-28_shipped/part.py $i 2 & done

Every second layer each, or every n-th, into results/ship0, results/ship1, ..., whose traces.jsonl belong together.
"""

import sys

from workbench import cli, ship

part, num_parts = map(int, sys.argv[1:])
plan = ship.plan()
shapes = list(dict.fromkeys(workload.shape for workload in plan))
mine = set(shapes[part::num_parts])
ship.plan = lambda: [workload for workload in plan if workload.shape in mine]
sys.argv = ["workbench", "ship", "--effort", "quick", "--results", f"results/ship{part}"]
cli.main()
