"""The table of a results file: the cells (shared with the terminal's table) and its Markdown form.

`python -m pygen.benchmarks.table results.json` prints the Markdown that the README shows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pygen.benchmarks.registry import COMPILED, EAGER, OURS
from pygen.benchmarks.results import baseline, doubtful, events_per_second, load, machine_line, median, timed

HEADINGS = ("case", "pygen", "eager", "compiled", "other", "floor", "vs best peer", "vs floor", "memory", "target")
NOTHING = "-"


def time_text(seconds: float | None) -> str:
    """Three digits and a unit: 3.21 us, 54.3 ms."""
    if seconds is None:
        return NOTHING
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 999.5 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def memory_text(size: int | None) -> str:
    if size is None:
        return NOTHING
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 999.5 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"


def _cell(case: dict[str, Any], name: str) -> str:
    """The time of an implementation, or why there is none."""
    entry = case["implementations"].get(name)
    if entry is None:
        return NOTHING
    if entry["status"] == "wrong":
        return entry["reason"].split(",")[0]
    if entry["status"] != "ok":
        return entry["status"]
    rate = events_per_second(case) if name == OURS else None
    more = [f"{rate / 1e6:.3g} M events/s"] if rate else []
    more += [f"{value:.3g} {what}" for what, value in entry.get("figures", {}).items()]
    return time_text(median(case, name)) + (f" ({', '.join(more)})" if more else "")


def _best_other(case: dict[str, Any]) -> str:
    """The fastest domain peer and every yardstick, by name; of a simulation all peers, with their time over ours."""
    others = timed(case, [name for name in case["implementations"] if name not in (OURS, EAGER, COMPILED)])
    if baseline(case) != EAGER:
        ours = median(case, OURS)
        over = {name: f" ({seconds / ours:.3g}x)" if ours else "" for name, seconds in others.items()}
        return ", ".join(f"{n} {time_text(seconds)}{over[n]}" for n, seconds in others.items()) or NOTHING
    best = [min(others, key=others.__getitem__)] if others else []
    return ", ".join(f"{n} {time_text(median(case, n))}" for n in [*best, *case["yardsticks"]]) or NOTHING


def _memory(case: dict[str, Any]) -> str:
    """Ours, and eager's beside it."""
    sizes = [case["implementations"].get(name, {}).get("peak_bytes") for name in (OURS, EAGER)]
    ours, eager = map(memory_text, sizes)
    return f"{ours} ({eager})" if sizes[1] is not None else ours


def _target(case: dict[str, Any]) -> str:
    texts = []
    for target in case["targets"]:
        verdict = {True: "yes", False: "NO", None: "not measured"}[target["met"]]
        if target["peer"] is None:
            texts.append(f"{verdict} ({target['sentence']})")
            continue
        bound = f"{target['at_least']:g}x" if target["at_least"] is not None else f"<= {target['at_most']:g}"
        of = "" if target.get("of", "time") == "time" else f"{target['of']} of "
        texts.append(f"{verdict} ({bound} {of}{target['peer']})")
    return ", ".join(texts) or NOTHING


def row(case: dict[str, Any]) -> list[str]:
    """One cell per heading."""
    speedup, ratio = case["speedup_over_best_peer"], case["ratio_to_floor"]
    return [
        f"{case['op']} {case['name']}",
        _cell(case, OURS),
        _cell(case, EAGER),
        _cell(case, COMPILED),
        _best_other(case),
        time_text(case["floor"]["seconds"] if case["floor"] else None),
        f"{speedup:.2f}x ({case['best_peer']})" if speedup else NOTHING,
        f"{ratio:.2f}" if ratio else NOTHING,
        _memory(case),
        _target(case),
    ]


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The headings, and a row for each case. Columns in which no case has anything are left out."""
    cells = [row(case) for case in results["cases"]]
    kept = [i for i in range(len(HEADINGS)) if any(line[i] != NOTHING for line in cells)]
    kept = sorted({0, *kept, len(HEADINGS) - 1})
    return [HEADINGS[i] for i in kept], [[line[i] for i in kept] for line in cells]


def markdown(results: dict[str, Any]) -> str:
    """A GitHub table, with the machine below it."""
    headings, cells = rows(results)
    lines = [
        "| " + " | ".join(headings) + " |",
        "|" + "|".join([" --- "] + [" ---: "] * (len(headings) - 2) + [" --- "]) + "|",
    ]
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in cells]
    note = "Medians; memory is the peak that one call allocates, in parentheses eager's."
    if any(case.get("unit", "call") != "call" for case in results["cases"]):
        note += " Times of a simulation are those of one trajectory, or of the unit that its name says."
    if not results["complete"]:
        note += " The run was interrupted: cases are missing."
    if doubtful(results):
        every = len(doubtful(results)) == len(results["cases"])
        names = "all of it" if every else ", ".join(doubtful(results))
        note += f" Other processes used the processor meanwhile; doubtful: {names}."
    if not results["machine"]["compiled_kernels"]:
        note += " Without compiled kernels: pygen ran on its plain reference."
    return "\n".join([*lines, "", f"{machine_line(results)}. {note}"])


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m pygen.benchmarks.table RESULTS.json", file=sys.stderr)
        return 2
    try:
        print(markdown(load(Path(arguments[0]))))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
