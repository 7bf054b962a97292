"""Memory of a search for the nearest codes: `python -m pygen.benchmarks.codebook_memory N K D` prints it as JSON.

A process of its own, because the peak of a process that did other things before says nothing.
"""

from __future__ import annotations

import json
import sys

import torch

from pygen import ops
from pygen.benchmarks.measure import process_bytes

WARM_UP_ROWS = 64


def main(n: int, k: int, d: int) -> None:
    """Print, in bytes, what is resident with rows and codes ("before"), the "peak" of all, the search's "growth"."""
    generator = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(count, d, generator=generator) for count in (n, k))
    ops.nearest_codebook(x[:WARM_UP_ROWS], codebook[:WARM_UP_ROWS])
    before = process_bytes("VmRSS")
    ops.nearest_codebook(x, codebook)
    peak = process_bytes("VmHWM")
    print(json.dumps({"before": before, "peak": peak, "growth": peak - before}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
