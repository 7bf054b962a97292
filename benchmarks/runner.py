"""Runs cases: check everyone against float64, then time everyone together. registry.py -> here -> results.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from pygen.benchmarks import machine
from pygen.benchmarks.measure import Call, Timing, clock, copy_call, gemm_call, measure
from pygen.benchmarks.registry import BEST, EAGER, OURS, Case, Floor, Inputs, Target, Unavailable
from pygen.benchmarks.results import SCHEMA

SEED = 0
RATE_SECONDS = 0.3
RATE_COPY_BYTES = 128 << 20
RATE_GEMM_FLOPS = 2 * 1024**3
COPY, GEMM = "copy", "gemm"

Progress = Callable[[Case, str, float], None]
Record = dict[str, Any]


def _selected(case: Case, peers: bool) -> list[str]:
    return [name for name in case.implementations if peers or name in (OURS, EAGER)]


def _reason(error: Exception) -> str:
    """The first line that says something, without the pages that torch.compile adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _check(case: Case, name: str, inputs: Inputs, expected: Any) -> tuple[Record, Call | None]:
    """(what to write down, the call to time or None)."""
    factory = case.implementations[name]
    try:
        call = factory(inputs)
        outputs = call()
    except ImportError as error:
        return {"status": "missing", "reason": f"not installed: {error}"}, None
    except Exception as error:  # a peer may fail in any way; the others are still measured
        return {"status": "failed", "reason": _reason(error)}, None
    found = case.error(outputs, expected)
    if not found <= case.allowed_error:
        reason = f"wrong: max error {found:.2g}, allowed {case.allowed_error:.2g}"
        return {"status": "wrong", "reason": reason, "max_error": _finite(found)}, None
    record = {"status": "ok", "max_error": found}
    if case.units:
        record["units_per_call"] = case.units.get(name, 1)
    if case.events is not None and name == OURS:
        record["events_per_unit"] = case.events(outputs)
    return record, call


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if abs(number) < float("inf") else None


def _floor_calls(case: Case, device: torch.device) -> dict[str, tuple[Call, int]]:
    """The copy and the matrix product that the floor is made of, with the bytes and flops that they do."""
    floor, calls = case.floor or Floor(), {}
    if floor.bytes:
        calls[COPY] = copy_call(floor.bytes, device)
    if floor.flops:
        low = floor.any_precision and machine.has_matrix_unit(device)
        calls[GEMM] = gemm_call(floor.flops, torch.bfloat16 if low else case.dtype, device)
    return calls


def _floor_record(floor: Floor | None, calls: dict[str, tuple[Call, int]], timings: dict[str, Timing]) -> Record | None:
    """The floor's seconds: work over the rate that was measured in turn with the implementations."""
    if floor is None or not calls:
        return None
    rates = {name: done / timings[f"floor {name}"].median for name, (_, done) in calls.items()}
    work = {COPY: floor.bytes, GEMM: floor.flops}
    return {
        "seconds": max(work[name] / rate for name, rate in rates.items()),
        "bytes": floor.bytes,
        "flops": floor.flops,
        "copy_bytes_per_second": rates.get(COPY),
        "gemm_flops_per_second": rates.get(GEMM),
    }


def _target_record(target: Target, ours: float | None, peer: float | None, ours_is_right: bool) -> Record:
    met = target.met(ours, peer) if ours and (peer or target.peer is None) else None
    return {
        "sentence": target.sentence(),
        "peer": target.peer,
        "at_least": target.at_least,
        "at_most": target.at_most,
        "of": target.of,
        "speedup": peer / ours if ours and peer and target.peer is not None else None,
        "met": met if ours_is_right else False,
    }


def _summarize(case: Case, record: Record, place: str) -> None:
    """Add the ratios and the verdict that follow from the timings."""
    everyone = {**record["implementations"], **record["yardsticks"]}
    median = {name: entry["seconds"]["median"] for name, entry in everyone.items() if "seconds" in entry}
    ours = median.get(OURS)
    peers = {name: median[name] for name in record["implementations"] if name != OURS and name in median}
    best = min(peers, key=peers.__getitem__) if peers else None
    floor = record["floor"]
    record["best_peer"] = best
    record["speedup_over_best_peer"] = peers[best] / ours if best and ours else None
    record["ratio_to_floor"] = ours / floor["seconds"] if ours and floor else None
    right = record["implementations"][OURS]["status"] == "ok"
    peak = {name: entry["peak_bytes"] for name, entry in everyone.items() if "peak_bytes" in entry}
    # The mean number of events is a property of the process, and so the same for everyone who simulates it.
    events = everyone[OURS].get("events_per_unit")
    rates = {name: events / median[name] for name in median if events}
    # Without the peers, nobody knows who is the best of them.
    everyone_took_part = set(record["implementations"]) == set(case.implementations)
    times = median | {BEST: peers[best]} if best and everyone_took_part else median
    measured = {"time": times, "memory": peak, "events": rates}
    record["targets"] = [
        _target_record(t, measured[t.of].get(OURS), measured[t.of].get(t.peer or ""), right)
        for t in case.targets
        if not t.on or place in t.on
    ]


def run_case(
    case: Case,
    device: torch.device,
    seconds: float,
    *,
    peers: bool = True,
    progress: Progress = lambda case, stage, fraction: None,
) -> Record:
    """Check, time and weigh one case; see results.py for the fields.

    Raises:
        Unavailable: the case cannot run here.
    """
    torch._dynamo.reset()  # another case's shapes must not make this one's compiled code dynamic
    progress(case, "reference", 0.0)
    inputs = case.make(device, torch.Generator(device).manual_seed(SEED))
    try:
        expected = case.reference(inputs.double())()
    except ImportError as error:
        raise Unavailable(f"what it is checked against is not installed: {error}") from None
    record: Record = {
        "op": case.op,
        "name": case.name,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "backward": bool(inputs.grads),
        "unit": case.unit,
        "baseline": case.baseline,
        "implementations": {},
        "yardsticks": {},
    }
    calls: dict[str, Call] = {}
    for name in _selected(case, peers):
        progress(case, f"checking {name}", 0.0)
        record["implementations"][name], call = _check(case, name, inputs, expected)
        if call is not None:
            calls[name] = call
    del expected
    if case.figures is not None and OURS in calls:
        record["implementations"][OURS]["figures"] = dict(case.figures(inputs))
    for name, factory in case.yardsticks.items():
        record["yardsticks"][name] = {"status": "ok"}
        calls[name] = factory(inputs)

    floor_calls = _floor_calls(case, device)
    timed = calls | {f"floor {name}": call for name, (call, _) in floor_calls.items()}
    with machine.Bystanders() as bystanders:
        timings = measure(
            timed,
            seconds,
            clock(device, overhead=case.overhead),
            lambda fraction: progress(case, "timing", fraction),
            long=case.long,
        )
    record["cores_busy_elsewhere"] = bystanders.cores
    progress(case, "memory", 1.0)
    for name, call in calls.items():
        entry = record["yardsticks" if name in case.yardsticks else "implementations"][name]
        entry["seconds"] = timings[name].per(case.units.get(name, 1)).as_dict()
        if case.weigh is not None:
            entry["peak_bytes"] = case.weigh(call, device)
    record["floor"] = _floor_record(case.floor, floor_calls, timings)
    _summarize(case, record, machine.place(device))
    return record


def measure_rates(device: torch.device, seconds: float = RATE_SECONDS) -> dict[str, float]:
    """What this machine does at best, for the record: a large copy, and a float32 matrix product."""
    calls = {COPY: copy_call(RATE_COPY_BYTES, device), GEMM: gemm_call(RATE_GEMM_FLOPS, torch.float32, device)}
    timings = measure({name: call for name, (call, _) in calls.items()}, seconds, clock(device))
    return {
        "copy_bytes_per_second": calls[COPY][1] / timings[COPY].median,
        "gemm_flops_per_second": calls[GEMM][1] / timings[GEMM].median,
    }


def run(
    cases: Iterable[Case],
    *,
    device: str | torch.device = "cpu",
    seconds: float = 4.0,
    peers: bool = True,
    progress: Progress = lambda case, stage, fraction: None,
    save: Callable[[Record], None] = lambda results: None,
) -> Record:
    """Run all cases in this process.

    `seconds` is the time spent timing one case; `peers=False` measures pygen and eager only; `save` gets the results
    after every case and at the end. An interrupt (Ctrl-C) returns what was measured until then, with
    `"complete": False`; when that is nothing, nothing is saved, so that a former file survives.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events, streams and the synchronisation are the current device's
    results: Record = {
        "schema": SCHEMA,
        "complete": False,
        "device": str(device),
        "seconds_per_case": seconds,
        "peers": peers,
        "machine": machine.facts(device),
        "rates": None,
        "cases": [],
        "skipped": [],
    }
    try:
        results["rates"] = measure_rates(device, min(seconds, RATE_SECONDS))
        for case in cases:
            try:
                results["cases"].append(run_case(case, device, seconds, peers=peers, progress=progress))
            except Unavailable as error:
                results["skipped"].append({"op": case.op, "name": case.name, "reason": str(error)})
            else:
                save(results)
    except KeyboardInterrupt:
        pass
    else:
        results["complete"] = True
    if results["cases"]:
        save(results)
    return results
