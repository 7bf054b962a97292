"""The results file: how it is written, read, and read out of. Written by runner.py, read by table.py and plot.py.

    {"schema": 1, "complete": true, "device": "cpu", "seconds_per_case": 4.0, "peers": true,
     "machine": {"cpu": ..., "cores": ..., "threads": ..., "torch": ..., "commit": ..., "date": ...},
     "rates": {"copy_bytes_per_second": ..., "gemm_flops_per_second": ...},
     "skipped": [{"op": ..., "name": ..., "reason": ...}],
     "cases": [{"op": ..., "name": ..., "shape": [...], "dtype": ..., "backward": ..., "unit": ..., "baseline": ...,
       "implementations": {"pygen": {"status": "ok", "max_error": ..., "peak_bytes": ...,
                                     "units_per_call": ..., "events_per_unit": ..., "figures": {...},
                                     "seconds": {"median", "min", "q1", "q3", "rounds", "calls_per_round"}},
                           "eager": {"status": "wrong", "reason": "wrong: max error ..."}, ...},
       "yardsticks": {"clone": ...},
       "floor": {"seconds": ..., "bytes": ..., "flops": ...} or null,
       "cores_busy_elsewhere": ...,
       "best_peer": ..., "speedup_over_best_peer": ..., "ratio_to_floor": ...,
       "targets": [{"sentence": ..., "peer": ..., "speedup": ..., "met": true, false, or null: not measured}]}]}

`status` is "ok", "wrong" (not timed), "failed" or "missing" (with a reason). Seconds are those of a unit: a call, or
what `unit` says, of which a call does `units_per_call`. `figures` are other numbers of ours, by name. Files from before
there were simulations lack what only these have: skipped, unit, baseline, units_per_call, events_per_unit.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pygen.benchmarks.registry import EAGER, OURS

SCHEMA = 1
BUSY_CORES = 0.3  # used by other processes while a case was timed; from here on its timings are doubtful


def save(results: dict[str, Any], path: Path) -> None:
    """Write under a temporary name and rename: an interrupted run leaves the former file or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(results, file, indent=1, allow_nan=False)
            file.write("\n")
        # mkstemp makes files private; results are as readable as any other new file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: the file is not one. OSError: it cannot be read.
    """
    try:
        results = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a results file of pygen bench: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f'{path} is not a results file of pygen bench: expected "schema": {SCHEMA}')
    return results


def median(case: dict[str, Any], name: str) -> float | None:
    """Seconds of an implementation or yardstick, None where it was not timed."""
    entry = case["implementations"].get(name) or case["yardsticks"].get(name) or {}
    return entry["seconds"]["median"] if "seconds" in entry else None


def timed(case: dict[str, Any], names: Iterable[str]) -> dict[str, float]:
    """Seconds of those among `names` that were timed."""
    return {name: seconds for name in names if (seconds := median(case, name)) is not None}


def baseline(case: dict[str, Any]) -> str:
    """Whose time the others are compared with in the picture."""
    return case.get("baseline", EAGER)


def events_per_second(case: dict[str, Any]) -> float | None:
    """Of our implementation, where the case is a simulation that was timed."""
    events, seconds = case["implementations"].get(OURS, {}).get("events_per_unit"), median(case, OURS)
    return events / seconds if events and seconds else None


def doubtful(results: dict[str, Any]) -> list[str]:
    """Names of the cases during which other processes took cores away."""
    cases = results["cases"]
    return [f"{c['op']} {c['name']}" for c in cases if (c["cores_busy_elsewhere"] or 0) > BUSY_CORES]


def machine_line(results: dict[str, Any]) -> str:
    """One line that says where the numbers come from."""
    m, rates = results["machine"], results["rates"]
    level = f", {m['cpu_capability']}" if m["cpu_capability"] else ""
    where = m["gpu"] or f"{m['cpu']}{level}, {m['threads']} thread{'s' * (m['threads'] != 1)}"
    parts = [where, f"torch {m['torch']}", f"pygen {m['pygen']}", m["date"][:10]]
    if rates:
        copy, gemm = rates["copy_bytes_per_second"] / 1e9, rates["gemm_flops_per_second"] / 1e9
        parts.append(f"copy {copy:.3g} GB/s, float32 GEMM {gemm:.3g} GFLOP/s")
    return " · ".join(parts)
