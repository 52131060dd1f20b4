"""From the traces of a run of `workbench ship`: by how many us the fastest kernel of a cell is over the floor, with
uniform routing and under a Zipf law of 1.2, where fewer experts are hit and the floor is lower; and what their ratio
would be if both were over it by as many us.

    PYTHONPATH=. python experiments/2026-11-29_limits/over_floor.py experiments/2026-11-28_shipped
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

BAR = 1.05


def main() -> None:
    summary = runpy.run_path(str(Path(__file__).parents[1] / "2026-11-27_compare" / "summary.py"))
    traces = summary["compared"](Path(sys.argv[1]))
    skewed = {cell.label: cell for cell in summary["measured"](traces, "zipf:1.2")}
    columns = ("", "floor", "ours", "over", "floor, zipf", "ours", "over", "ours / floor", "zipf", "zipf / uniform")
    print("| " + " | ".join((*columns, "by as many us")) + " |")
    print("| --- " + "| ---: " * 10 + "|")
    num_cells = over_bar = over_bar_by_as_many = 0
    for cell in summary["measured"](traces, summary["UNIFORM"]):
        pair = cell, skewed[cell.label]
        us, floor = [summary["us"](each.ours) for each in pair], [each.floor for each in pair]
        over = [us[i] - floor[i] for i in (0, 1)]
        ratios = [us[i] / floor[i] for i in (0, 1)]
        by_as_many = (1 + over[0] / floor[1]) / ratios[0]
        figures = [f"{value:.1f}" for i in (0, 1) for value in (floor[i], us[i], over[i])]
        figures += [f"{value:.2f}" for value in (*ratios, ratios[1] / ratios[0], by_as_many)]
        print(f"| {cell.label} | " + " | ".join(figures) + " |")
        num_cells += 1
        over_bar += ratios[1] / ratios[0] > BAR
        over_bar_by_as_many += by_as_many > BAR
    print(f"\n{over_bar} of {num_cells} cells are over {BAR}; {over_bar_by_as_many} if over the floor by as many us")


if __name__ == "__main__":
    main()
