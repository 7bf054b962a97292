"""`pygen simulate`: reads a model, simulates an ensemble, prints a table, writes a file and a picture."""

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pygen.ssa.network import Network
    from pygen.ssa.run import Run

INTERRUPTED = 130  # what a shell reports for Ctrl-C
_MOST_ROWS, _MOST_COLUMNS = 6, 6  # of the table
_SNIFFED = 4096  # bytes of an XML file in which its first element stands
console = Console()


def _read_model(name: str) -> "Network":
    """A model from a file, by its ending, or a built-in one by its name."""
    from pygen.ssa import examples
    from pygen.ssa.bngl import read_bngl_net
    from pygen.ssa.sbml import read_sbml
    from pygen.ssa.stochkit import read_stochkit

    path = Path(name)
    if not path.suffix and not path.exists():
        if name not in examples.MODELS:
            raise ValueError(f"no model or file {name!r}; built in: {', '.join(sorted(examples.MODELS))}")
        return examples.MODELS[name]()
    if path.suffix == ".net":
        return read_bngl_net(path)
    if path.suffix not in (".xml", ".sbml"):
        hint = "; BioNetGen writes the .net file that pygen reads" if path.suffix == ".bngl" else ""
        raise ValueError(f"{path}: a model is SBML (.xml, .sbml), StochKit (.xml) or BioNetGen (.net){hint}")
    with open(path, "rb") as file:
        is_sbml = b"<sbml" in file.read(_SNIFFED)
    return read_sbml(path) if is_sbml or path.suffix == ".sbml" else read_stochkit(path)


def _number(option: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{option} takes numbers, got {word!r}") from None


def _grid(word: str) -> list[float]:
    """0:50:51 as 51 times from 0 to 50; 0,1,10 as they are."""
    import numpy as np

    parts = word.split(":")
    if len(parts) == 1:
        return [_number("--t", part) for part in word.split(",")]
    if len(parts) != 3 or not parts[2].isdigit() or int(parts[2]) < 1:
        raise ValueError(f"--t takes START:STOP:POINTS, as 0:50:51, or times with commas between; got {word!r}")
    return np.linspace(_number("--t", parts[0]), _number("--t", parts[1]), int(parts[2])).tolist()


def _assignments(option: str, words: Sequence[str] | None) -> dict[str, float] | None:
    """["k=2", "d=0.1"] as {"k": 2.0, "d": 0.1}."""
    pairs = [word.partition("=") for word in words or ()]
    for (name, equals, value), word in zip(pairs, words or (), strict=True):
        if not (name and equals and value):
            raise ValueError(f"{option} takes NAME=VALUE, got {word!r}")
    return {name.strip(): _number(option, value) for name, _, value in pairs} or None


def _list(word: str | None) -> tuple[str, ...] | None:
    return None if word is None else tuple(part.strip() for part in word.split(",") if part.strip())


def _check_picture(path: Path) -> None:
    """Refuse a name that matplotlib cannot write, before the simulation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.filetypes
    if path.suffix[1:] not in known:
        raise ValueError(
            f"--plot {path}: the name must end in one of {', '.join('.' + name for name in sorted(known))}"
        )


def simulate(
    model: Annotated[str, typer.Argument(help="SBML, StochKit (.xml) or BioNetGen (.net) file, or a built-in model.")],
    t: Annotated[str, typer.Option(help="START:STOP:POINTS, as 0:50:51, or times with commas between.")],
    trajectories: Annotated[int, typer.Option(help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(help="Same seed, same trajectories, on any machine.")] = 0,
    method: Annotated[str, typer.Option(help="auto, direct, sparse; tau is approximate.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    parameters: Annotated[list[str] | None, typer.Option("--set", help="A parameter, as k=2.")] = None,
    initial: Annotated[list[str] | None, typer.Option(help="An initial count, as A=5.")] = None,
    stop: Annotated[str | None, typer.Option(help='End a trajectory when this holds, as "A == 0".')] = None,
    reduce: Annotated[
        str | None,
        typer.Option(help="Keep statistics only: moments, covariance, histogram, first_passage; commas between."),
    ] = None,
    species: Annotated[str | None, typer.Option(help="Record these only, commas between.")] = None,
    max_events: Annotated[int | None, typer.Option(help="End a trajectory after so many reactions.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    kind: Annotated[str, typer.Option(help="Of picture: mean, trajectories or histogram.")] = "mean",
    out: Annotated[Path | None, typer.Option(help="Write the run: .npz, .nc, .zarr or .csv.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; all by default.")] = None,
) -> None:
    """Simulate a reaction network, exactly and reproducibly; Ctrl-C keeps what is finished."""
    from pygen.ssa import _plot, _store
    from pygen.ssa.simulate import simulate as simulate_network

    if out is not None:
        _store.check_path(out)
    if plot is not None:
        _check_picture(plot)
    if kind not in _plot.KINDS:
        raise ValueError(f"--kind must be one of {', '.join(_plot.KINDS)}, got {kind!r}")
    kept = _list(reduce)
    if kept and not {"moments", "covariance"} & set(kept):
        kept += ("moments",)  # the table needs them
    arguments: dict[str, Any] = {
        "t": _grid(t),
        "trajectories": trajectories,
        "seed": seed,
        "method": method,
        "device": device,
        "parameters": _assignments("--set", parameters),
        "initial": _assignments("--initial", initial),
        "stop": stop,
        "reduce": kept,
        "record": _list(species),
        "max_events": max_events,
        "threads": threads,
    }
    network = _read_model(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = simulate_network(network, **arguments)
    for warning in caught:
        print(f"pygen: {warning.message}", file=sys.stderr)
    _report(run)
    if out is not None:
        run.save(out)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    if plot is not None:
        run.plot(kind, path=plot)
        console.print(f"wrote {plot}", highlight=False, soft_wrap=True)
    if run.interrupted:
        raise typer.Exit(INTERRUPTED)


def _cell(mean: float, std: float) -> str:
    if math.isnan(mean):
        return "-"  # no trajectory got there
    return f"{mean:.5g}" if math.isnan(std) else f"{mean:.5g} ± {std:.4g}"


def _report(run: "Run") -> None:
    """The mean and standard deviation at a few times, how the trajectories ended, and how long it took."""
    import numpy as np

    shown = run.species[:_MOST_COLUMNS]
    rows = np.unique(np.linspace(0, len(run.t) - 1, min(_MOST_ROWS, len(run.t))).round().astype(int))
    mean, std = run.mean(), run.std()
    table = Table("time", *shown)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        cells = (_cell(float(mean[row, k]), float(std[row, k])) for k in range(len(shown)))
        table.add_row(f"{run.t[row]:g}", *cells)
    console.print(f"{run.source.name}: mean ± standard deviation", highlight=False, soft_wrap=True)
    console.print(table)
    if len(run.species) > len(shown):
        console.print(f"and {len(run.species) - len(shown)} more species; choose with --species", highlight=False)
    statuses = ", ".join(f"{n:,} {name}" for name, n in run.status_counts.items() if n)
    console.print(
        f"{run.trajectories:,} trajectories: {statuses}\n{run.total_events:.4g} events in {run.elapsed:.2f} s, "
        f"{run.events_per_second:.3g} per second; seed {run.seed}, {run.origin.method} on {run.origin.device}",
        highlight=False,
        soft_wrap=True,
    )
    if run.stop_time is not None and run.status_counts["stopped"]:
        passed = run.stop_time[run.stop_time.isfinite()]
        console.print(
            f"stopped at {passed.mean():.5g} ± {passed.std():.4g} (mean ± standard deviation of those that stopped)",
            highlight=False,
            soft_wrap=True,
        )
    if run.interrupted:
        console.print("interrupted: the statistics are of the trajectories that were finished first", soft_wrap=True)
