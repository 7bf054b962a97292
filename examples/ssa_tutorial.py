"""The pictures and the table of docs/ssa.md: ensembles beside closed forms and beside the master equation.

    python examples/ssa_tutorial.py                    # all of it, two minutes on one core
    python examples/ssa_tutorial.py --only vilar       # one picture

Needs matplotlib and scipy (`pip install '.[cli,ssa]'`). Every number depends on the seeds below and on nothing else.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from pygen import ssa
from pygen.ssa import examples

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no window)

DOCS = Path(__file__).parents[1] / "docs"
INK, OURS, OTHER, WARM = "#22303c", "#0b7a75", "#b8c1c9", "#d55e00"
DPI = 100
TABLE = re.compile(r"(<!-- master equation begin -->\n).*?(<!-- master equation end -->)", re.DOTALL)


def panels(width: float, height: float, *shape: int, **options: Any) -> tuple[Any, Any]:
    figure, axes = plt.subplots(*shape, figsize=(width, height), layout="constrained", squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
    return figure, axes


def save(figure: Any, name: str) -> None:
    path = DOCS / "images" / f"ssa_{name}.png"
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)
    print(f"{path.relative_to(DOCS.parent)}: {path.stat().st_size // 1024} KB")


def immigration_death() -> None:
    """Three trajectories, the band that nine of ten are in, and the exact mean."""
    t = np.linspace(0, 8, 161)
    run = ssa.simulate(examples.immigration_death(immigration=50, X=0), t, 10_000, seed=1)
    low, high = run.quantile([0.05, 0.95])[:, :, 0].numpy()
    figure, ((axis,),) = panels(6.4, 3.6, 1, 1)
    axis.fill_between(t, low, high, color=OURS, alpha=0.18, linewidth=0, label="5% to 95% of 10,000 trajectories")
    for x in run.counts[:3, :, 0].numpy():
        axis.plot(t, x, drawstyle="steps-post", color=OTHER, linewidth=0.9)
    axis.plot(t, run.mean()[:, 0], color=OURS, linewidth=2.4, label="their mean")
    axis.plot(t, 50 * (1 - np.exp(-t)), color=INK, linewidth=1, linestyle="--", label="50 (1 - exp(-t))")
    axis.set(xlabel="time", ylabel="X", xlim=(0, 8), ylim=(0, None))
    axis.legend(frameon=False, loc="lower right")
    save(figure, "immigration_death")


def schlogl() -> None:
    """Trajectories that fall into one of two wells; their distribution as simulated and as computed; the table."""
    net, t, n = examples.schlogl(), np.array([1.0, 2.0, 4.0]), 100_000
    paths = ssa.simulate(net, np.linspace(0, 10, 501), 12, seed=2)
    run = ssa.simulate(net, t, n, seed=1)
    solution = ssa.solve_cme(net, t)

    figure, ((left, right),) = panels(9.6, 3.6, 1, 2, width_ratios=(1.1, 1))
    for x in paths["X"].numpy():
        left.plot(paths.t, x, color=OURS, linewidth=0.8, alpha=0.7)
    left.axhline(256, color=INK, linewidth=0.8, linestyle="--")
    left.set(xlabel="time", ylabel="X", xlim=(0, 10), ylim=(0, 800), title="12 trajectories from X = 250")
    counts, p = solution.marginal("X")
    edges = np.arange(0, 811, 10)
    right.hist(run["X"][:, -1], edges, density=True, color=OURS, alpha=0.35, label="100,000 trajectories")
    right.plot(counts, p[-1], color=INK, linewidth=1.4, label="master equation")
    right.set(xlabel="X", ylabel="probability", xlim=(0, 800), title="at time 4")
    right.legend(frameon=False)
    save(figure, "schlogl")

    rows = [
        "| time | P(X < 256), master equation | bound on its error | 100,000 trajectories | z |",
        "| ---: " * 5 + "|",
    ]
    simulated = (run["X"] < 256).double().mean(0).numpy()
    for time, exact, bound, share in zip(t, solution.probability("X < 256"), solution.bound, simulated, strict=True):
        error = np.sqrt(exact * (1 - exact) / n)
        rows.append(
            f"| {time:g} | {exact:.6f} | {bound:.1e} | {share:.5f} ± {error:.5f} | {(share - exact) / error:+.2f} |"
        )
    page = DOCS / "ssa.md"
    table = "\n".join(rows)
    page.write_text(TABLE.sub(rf"\g<1>{table}\n\g<2>", page.read_text(encoding="utf-8")), encoding="utf-8")
    print(table)


def toggle() -> None:
    """The joint distribution of the toggle switch both ways, and the time until it first switches."""
    net, t = examples.toggle_switch(A=10, B=0), np.array([20.0])
    run = ssa.simulate(net, t, 100_000, seed=2)
    solution = ssa.solve_cme(net, t)
    side = 20
    simulated = np.histogram2d(*run.counts[:, 0].numpy().T, bins=np.arange(-0.5, side + 1))[0] / 100_000
    computed = np.zeros((side + 1, side + 1))
    inside = (solution.states <= side).all(1)
    computed[tuple(solution.states[inside].T)] = solution.probabilities[0, inside]

    figure, ((one, two, three),) = panels(9.6, 3.2, 1, 3, width_ratios=(1, 1, 1.25))
    for axis, p, title in ((one, simulated, "100,000 trajectories"), (two, computed, "master equation")):
        axis.imshow(np.sqrt(p.T), origin="lower", cmap="Greens", vmin=0)
        axis.set(xlabel="A", ylabel="B", title=title)
    times = np.linspace(0, 200, 101)
    switch = "B > A + 5"
    first = ssa.simulate(net, [200.0], 10_000, seed=3, stop=switch, reduce="first_passage")
    waiting = np.sort(first.stop_time.numpy())
    exact = ssa.solve_cme(net, times, stop=switch).probability(switch)
    three.plot(waiting, np.arange(1, len(waiting) + 1) / len(waiting), color=OURS, linewidth=3, alpha=0.5)
    three.plot(times, exact, color=INK, linewidth=1)
    three.set(xlabel="time", xlim=(0, 200), ylim=(0, 1), title=f"first time at which {switch}")
    save(figure, "toggle")


def scan() -> None:
    """The noise of protein numbers for 1,000 rates of translation, a hundred trajectories each, in one call."""
    rates = np.linspace(0.1, 10, 1000)
    run = ssa.simulate(
        examples.two_stage_expression(), [16.0], 100_000, seed=4, parameters={"translation": np.repeat(rates, 100)}
    )
    n = run["n"][:, 0].numpy().reshape(1000, 100)
    figure, ((axis,),) = panels(6.4, 3.4, 1, 1)
    axis.scatter(rates, n.var(1, ddof=1) / n.mean(1), s=5, color=OURS, alpha=0.6, label="100 trajectories each")
    axis.plot(rates, 1 + rates / 2, color=INK, linewidth=1.2, label="1 + rate / 2")
    axis.set(xlabel="rate of translation", ylabel="variance / mean", xlim=(0, 10), ylim=(0, None))
    axis.legend(frameon=False)
    save(figure, "scan")


def vilar() -> None:
    """One clock, and how a thousand of them get out of step."""
    net, t = examples.vilar_oscillator(), np.linspace(0, 200, 1001)
    run = ssa.simulate(net, t, 1000, seed=5, record=["A", "R"], reduce=["moments", "histogram"])
    one = ssa.simulate(net, t, 1, seed=5)
    low, high = run.quantile([0.05, 0.95])[:, :, 1].numpy()
    figure, axes = panels(9.6, 5.2, 2, 1, sharex=True)
    top, bottom = axes[:, 0]
    top.plot(t, one["A"][0], color=WARM, linewidth=0.9, label="activator A")
    top.plot(t, one["R"][0], color=OURS, linewidth=1.2, label="repressor R")
    top.set(ylabel="molecules", title="one trajectory", xlim=(0, 200), ylim=(0, None))
    top.legend(frameon=False, loc="upper right", ncols=2)
    bottom.fill_between(t, low, high, color=OURS, alpha=0.18, linewidth=0, label="5% to 95% of 1,000 trajectories")
    bottom.plot(t, run.mean()[:, 1], color=OURS, linewidth=1.8, label="mean of R")
    bottom.set(xlabel="hours", ylabel="repressor R", ylim=(0, None))
    bottom.legend(frameon=False, loc="upper right", ncols=2)
    save(figure, "vilar")


PARTS: dict[str, Callable[[], None]] = {
    part.__name__: part for part in (immigration_death, schlogl, toggle, scan, vilar)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    options = parser.parse_args()
    for name, part in PARTS.items():
        if options.only in (None, name):
            part()


if __name__ == "__main__":
    main()
