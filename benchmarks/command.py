"""`pygen bench`: choose cases, run them with progress shown, print and write the results."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pygen.benchmarks import registry, results, table
from pygen.benchmarks.registry import OURS, Case
from pygen.benchmarks.runner import run

INTERRUPTED = 130  # what a shell reports for Ctrl-C
TABLE_WIDTH = 180  # for files and pipes, which do not say how wide they are


def _fail(sentence: str) -> typer.Exit:
    typer.echo(f"pygen bench: {sentence}", err=True)
    return typer.Exit(2)


def _select(ops: list[str] | None, pattern: str | None) -> list[Case]:
    every = registry.cases()
    known = list(dict.fromkeys(case.op for case in every))
    for op in ops or ():
        if op not in known:
            raise _fail(f"no benchmark is called {op!r}; the ops are {', '.join(known)}")
    chosen = [case for case in every if (not ops or case.op in ops) and (pattern or "") in case.label]
    if not chosen:
        raise _fail(f"no case of {', '.join(ops or known)} has {pattern!r} in its name; --list shows the names")
    return chosen


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _fail(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise _fail(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise _fail(f"--device {name}: this torch ({torch.__version__}) finds no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _fail(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def _check_output(option: str, path: Path | None) -> None:
    """Complain before an hour of measuring, not after."""
    if path is None:
        return
    if path.is_dir():
        raise _fail(f"{option} must name a file, {path} is a directory")
    if not path.parent.is_dir():
        raise _fail(f"{option}: the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise _fail(f"{option}: the directory {path.parent} is not writable")


def _check_plot(path: Path | None) -> None:
    _check_output("--plot", path)
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise _fail("--plot needs matplotlib: pip install 'pygen[cli]'")
    if path is not None and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise _fail(f"--plot must end in .png, .svg or .pdf, got {path.name!r}")


def _list(cases: Iterable[Case], console: Console) -> None:
    shown = Table(title="benchmark cases")
    for heading in ("op", "case", "measured beside pygen", "target"):
        shown.add_column(heading, overflow="fold")
    for case in cases:
        others = [name for name in (*case.implementations, *case.yardsticks) if name != OURS]
        shown.add_row(case.op, case.name, ", ".join(others), "\n".join(t.sentence() for t in case.targets) or "-")
    console.print(shown)


def _print(measured: dict[str, Any], console: Console) -> None:
    shown = Table(caption=results.machine_line(measured), caption_justify="left")
    headings, rows = table.rows(measured)
    for heading in headings:
        left = heading in ("case", "target")
        shown.add_column(heading, justify="left" if left else "right", min_width=7, overflow="fold")
    for case, cells in zip(measured["cases"], rows, strict=True):
        verdicts = [target["met"] for target in case["targets"]]
        color = "red" if False in verdicts else "green" if True in verdicts else "default"
        cells[-1] = f"[{color}]{cells[-1]}[/{color}]"
        cells[1] = f"[bold]{cells[1]}[/bold]"
        shown.add_row(*cells)
    if measured["cases"]:
        console.print(shown)
    for case in measured["cases"]:
        for name, entry in case["implementations"].items():
            if entry["status"] != "ok":
                console.print(f"{case['op']} {case['name']}, {name}: {entry['reason']}", markup=False)
    for case in measured["skipped"]:
        console.print(f"{case['op']} {case['name']} was skipped: {case['reason']}", markup=False)
    if measured["cases"]:
        _print_doubts(measured, console)


def _print_doubts(measured: dict[str, Any], console: Console) -> None:
    if not measured["machine"]["compiled_kernels"]:
        console.print("pygen ran on its plain reference here: the compiled kernels are missing (see pygen doctor).")
    doubtful = results.doubtful(measured)
    if doubtful:
        which = "every case was" if len(doubtful) == len(measured["cases"]) else ", ".join(doubtful) + " were"
        console.print(f"Other processes used the processor while {which} timed: these numbers are doubtful.")


def _measure(cases: list[Case], json: Path | None, **options: Any) -> dict[str, Any]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("measuring this machine", total=len(cases))
        number = {case.label: i for i, case in enumerate(cases)}

        def progress(case: Case, stage: str, fraction: float) -> None:
            bar.update(task, description=f"{case.label}: {stage}", completed=number[case.label] + fraction)

        def save(measured: dict[str, Any]) -> None:
            if json is not None:
                results.save(measured, json)

        return run(cases, progress=progress, save=save, **options)


def _plot(measured: dict[str, Any], path: Path) -> None:
    from pygen.benchmarks.plot import plot

    try:
        plot(measured, path)
    except (OSError, ValueError) as error:
        raise _fail(f"--plot {path}: {error}") from None


def bench(
    ops: list[str] = typer.Argument(None, help="Ops to measure; all when none is named."),  # noqa: B008
    peers: bool = typer.Option(True, "--peers/--no-peers", help="Measure torch.compile and other libraries as well."),
    device: str = typer.Option("cpu", help="cpu, cuda or cuda:N."),
    json: Path = typer.Option(None, metavar="FILE", help="Write the results here, after every case."),  # noqa: B008
    plot: Path = typer.Option(None, metavar="FILE", help="Draw the speed-ups as PNG, SVG or PDF."),  # noqa: B008
    seconds: float = typer.Option(4.0, help="Time spent timing each case (compiling and checking come on top)."),
    threads: int = typer.Option(None, help="CPU threads; torch's default when not given."),
    case: str = typer.Option(None, metavar="TEXT", help="Only cases whose name contains TEXT."),
    list_cases: bool = typer.Option(False, "--list", help="List the cases and their targets, measure nothing."),
) -> None:
    """Time pygen's ops against eager PyTorch, torch.compile and other libraries, after checking every result."""
    chosen = _select(ops, case)
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    if list_cases:
        _list(chosen, console)
        return
    where = _device(device)
    if not seconds > 0:
        raise _fail(f"--seconds must be positive, got {seconds:g}")
    if threads is not None and threads < 1:
        raise _fail(f"--threads must be at least 1, got {threads}")
    _check_output("--json", json)
    _check_plot(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        measured = _measure(chosen, json, device=where, seconds=seconds, peers=peers)
    except OSError as error:
        raise _fail(f"the results could not be written: {error}") from None
    _finish(measured, len(chosen), json, plot, console)


def _finish(measured: dict[str, Any], count: int, json: Path | None, plot: Path | None, console: Console) -> None:
    _print(measured, console)
    if measured["cases"]:
        if plot is not None:
            _plot(measured, plot)
            console.print(f"picture: {plot}", soft_wrap=True)
        if json is not None:
            console.print(f"results: {json}", soft_wrap=True)
    if not measured["complete"]:
        kept = ", which are kept" if measured["cases"] and json is not None else ""
        typer.echo(f"pygen bench: interrupted after {len(measured['cases'])} of {count} cases{kept}", err=True)
        raise typer.Exit(INTERRUPTED)
    wrong = [c for c in measured["cases"] if c["implementations"][OURS]["status"] != "ok"]
    if wrong:
        names = ", ".join(f"{c['op']} {c['name']}" for c in wrong)
        typer.echo(f"pygen bench: pygen gave no right result for {names}", err=True)
        raise typer.Exit(1)
