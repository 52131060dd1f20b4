"""Half of the plan of `workbench ship`, for one of two GPUs at a time:

    CUDA_VISIBLE_DEVICES=0 PYTHONPATH=. python experiments/2026-11-28_shipped/half.py 0 &
    CUDA_VISIBLE_DEVICES=1 PYTHONPATH=. python experiments/2026-11-28_shipped/half.py 1 &

Every other layer each, into results/ship0 and results/ship1, whose traces.jsonl belong together.
"""

import sys

from workbench import cli, ship

half = int(sys.argv[1])
plan = ship.plan()
shapes = list(dict.fromkeys(workload.shape for workload in plan))
mine = set(shapes[half::2])
ship.plan = lambda: [workload for workload in plan if workload.shape in mine]
sys.argv = ["workbench", "ship", "--effort", "quick", "--results", f"results/ship{half}"]
cli.main()
