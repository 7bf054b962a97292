"""Memory of a reduced simulation: `python -m pygen.benchmarks.ssa_memory TRAJECTORIES` prints it as JSON.

A process of its own, because the peak of a process that did other things before says nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pygen.benchmarks.cases.ssa import MILLION_END, POINTS, reduced
from pygen.ssa.examples import immigration_death

WARM_UP_TRAJECTORIES = 64


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status. Unlike getrusage's, VmHWM does not begin with the parent's peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(trajectories: int) -> None:
    """Print, in bytes, what is resident after a small run ("before"), the "peak" of a large one, and its "growth"."""
    net = immigration_death()
    grid = torch.linspace(0, MILLION_END, POINTS, dtype=torch.float64)
    reduced(net, grid, WARM_UP_TRAJECTORIES)
    before = _status("VmRSS")
    reduced(net, grid, trajectories)
    peak = _status("VmHWM")
    print(json.dumps({"before": before, "peak": peak, "growth": peak - before}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
