"""Memory of a reduced simulation: `python -m pygen.benchmarks.ssa_memory TRAJECTORIES` prints it as JSON.

A process of its own, because the peak of a process that did other things before says nothing.
"""

from __future__ import annotations

import json
import sys

import torch

from pygen.benchmarks.cases.ssa import MILLION_END, POINTS, reduced
from pygen.benchmarks.measure import process_bytes
from pygen.ssa.examples import immigration_death

WARM_UP_TRAJECTORIES = 64


def main(trajectories: int) -> None:
    """Print, in bytes, what is resident after a small run ("before"), the "peak" of a large one, and its "growth"."""
    net = immigration_death()
    grid = torch.linspace(0, MILLION_END, POINTS, dtype=torch.float64)
    reduced(net, grid, WARM_UP_TRAJECTORIES)
    before = process_bytes("VmRSS")
    reduced(net, grid, trajectories)
    peak = process_bytes("VmHWM")
    print(json.dumps({"before": before, "peak": peak, "growth": peak - before}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
