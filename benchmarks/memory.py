"""Memory of a training step against depth: a Glow that stores its activations beside one that inverts its layers.

`python -m pygen.benchmarks.memory --json F --plot F` measures, prints and draws it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pygen import nn
from pygen.benchmarks import machine
from pygen.benchmarks.cases.glow import deep_glow, training_step
from pygen.benchmarks.measure import clock, measure, peak_bytes
from pygen.benchmarks.plot import COMPILED_COLOR, FAINT, INK, OUR_COLOR

DEPTHS = (8, 16, 32, 64)
SHAPE, HIDDEN = (32, 12, 16, 16), 64
KINDS = {"ReversibleSequential": nn.ReversibleSequential, "Sequential": nn.Sequential}


def measure_depth(depth: int, device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Peak bytes of what a step allocates besides the gradients that it returns, and its median seconds."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    calls = {
        name: training_step(deep_glow(kind, depth, SHAPE[1], HIDDEN).to(device), x) for name, kind in KINDS.items()
    }
    returned = {name: sum(t.nbytes for t in call()) for name, call in calls.items()}
    timings = measure(calls, seconds, clock(device))
    return {
        name: {"peak_bytes": peak_bytes(call, device) - returned[name], "seconds": timings[name].median}
        for name, call in calls.items()
    }


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for name, color in zip(KINDS, (OUR_COLOR, COMPILED_COLOR), strict=True):
        mebibytes = [results["depths"][str(depth)][name]["peak_bytes"] / 2**20 for depth in DEPTHS]
        axes.plot(DEPTHS, mebibytes, "o-", color=color, linewidth=2, label=f"nn.{name}")
        axes.annotate(
            f"{mebibytes[-1]:.0f} MiB", (DEPTHS[-1], mebibytes[-1]), (-6, 7), textcoords="offset points", ha="right"
        )
    axes.set_xticks(DEPTHS)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Glow steps")
    axes.set_ylabel("MiB of a training step")
    axes.set_title(f"Memory against depth, batch of {'x'.join(map(str, SHAPE))}", color=INK, loc="left")
    axes.grid(color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them, as PNG, SVG or PDF.")] = None,
    seconds: Annotated[float, typer.Option(help="Time spent timing each depth.")] = 10.0,
) -> None:
    """Measure a training step of a Glow of 8, 16, 32 and 64 steps, storing activations and inverting instead."""
    where = torch.device(device)
    results: dict[str, Any] = {
        "shape": SHAPE,
        "hidden": HIDDEN,
        "device": device,
        "machine": machine.facts(where),
        "depths": {},
    }
    typer.echo("depth  reversible   storing    memory ratio  time ratio")
    for depth in DEPTHS:
        row = measure_depth(depth, where, seconds)
        results["depths"][str(depth)] = row
        ours, theirs = (row[name] for name in KINDS)
        typer.echo(
            f"{depth:5d}  {ours['peak_bytes'] / 2**20:7.1f} MiB {theirs['peak_bytes'] / 2**20:7.1f} MiB  "
            f"{ours['peak_bytes'] / theirs['peak_bytes']:12.3f}  {ours['seconds'] / theirs['seconds']:10.2f}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    if plot is not None:
        draw(results, plot)


if __name__ == "__main__":
    typer.run(main)
