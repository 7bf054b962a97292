"""The picture of a results file: speed-up over eager PyTorch, one group of bars per case, the floor marked.

Simulations have no eager form: their bars are the speed-up over the first peer, which the label then names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pygen.benchmarks.registry import COMPILED, EAGER, OURS
from pygen.benchmarks.results import baseline, machine_line, median, timed

OUR_COLOR = "#0b7a75"
COMPILED_COLOR = "#e0a458"
PEER_COLORS = ("#8d99ae", "#b56576", "#6d597a", "#a3b18a")
INK, FAINT = "#22303c", "#d9dee3"
WIDTH, LABEL_SIZE = 10.0, 9.5  # inches, points
BAR, GAP = 0.34, 0.4  # inches: one bar, and the space between two cases


def _bars(case: dict[str, Any]) -> dict[str, float]:
    """Speed-up over the baseline of everyone that was timed, ours first."""
    base = baseline(case)
    seconds_of_base = median(case, base)
    if not seconds_of_base:
        return {}
    names = [OURS, *(name for name in case["implementations"] if name not in (OURS, base))]
    return {name: seconds_of_base / seconds for name, seconds in timed(case, names).items()}


def _colors(cases: list[dict[str, Any]]) -> dict[str, str]:
    names = dict.fromkeys(name for case in cases for name in _bars(case))
    colors = {OURS: OUR_COLOR, COMPILED: COMPILED_COLOR}
    others = [name for name in names if name not in colors]
    colors |= {name: PEER_COLORS[i % len(PEER_COLORS)] for i, name in enumerate(others)}
    return {name: colors[name] for name in names}


def _draw_case(axes: Any, case: dict[str, Any], top: float, colors: dict[str, str]) -> float:
    """Draw one group downwards from `top`; return where it ends."""
    bars = _bars(case)
    for i, (name, speedup) in enumerate(bars.items()):
        y = top - (i + 0.5) * BAR
        axes.barh(y, speedup - 1, left=1, height=BAR * 0.86, color=colors[name], zorder=2)
        axes.annotate(
            f"{speedup:.3g}x" if speedup < 999.5 else f"{speedup:.0f}x",
            (speedup, y),
            xytext=(5 if speedup >= 1 else -5, 0),
            textcoords="offset points",
            ha="left" if speedup >= 1 else "right",
            va="center",
            fontsize=9,
            color=INK,
            fontweight="bold" if name == OURS else "normal",
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    bottom = top - len(bars) * BAR
    if case["floor"]:
        limit = (median(case, baseline(case)) or 0.0) / case["floor"]["seconds"]
        axes.plot([limit] * 2, [bottom, top], color=INK, linewidth=1.8, linestyle=(0, (2, 1.2)), zorder=3)
    return bottom


def _draw(axes: Any, cases: list[dict[str, Any]]) -> None:
    colors = _colors(cases)
    top, ticks = 0.0, []
    for case in cases:
        bottom = _draw_case(axes, case, top, colors)
        ticks.append((top + bottom) / 2)
        top = bottom - GAP
    axes.set_yticks(ticks, [_label(case) for case in cases], fontsize=LABEL_SIZE, color=INK)
    axes.set_ylim(top + GAP / 2, GAP / 2)
    _scale(axes, {baseline(case) for case in cases})
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color, label=name) for name, color in colors.items()]
    if any(case["floor"] for case in cases):
        dashes = Line2D([], [], color=INK, linewidth=1.8, linestyle=(0, (2, 1.2)), label="floor (memory copy, GEMM)")
        handles.append(dashes)
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncol=len(handles), frameon=False, fontsize=9)


def _label(case: dict[str, Any]) -> str:
    base = baseline(case)
    return f"{case['op']}{'' if base == EAGER else f', over {base}'}\n{case['name']}"


def _label_inches(cases: list[dict[str, Any]]) -> float:
    """Room for the longest label: a letter is about 0.6 of its size wide, an inch has 72 points."""
    letters = max(len(line) for case in cases for line in _label(case).split("\n"))
    return letters * LABEL_SIZE * 0.6 / 72 + 0.25


def _scale(axes: Any, baselines: set[str]) -> None:
    """A log axis with plain numbers, wide enough for the labels at the bars' ends."""
    axes.set_xscale("log")
    low, high = axes.dataLim.x0, axes.dataLim.x1
    low, high = min(low, 0.9), max(high, 2.0)
    margin = (high / low) ** 0.12
    low, high = low / margin, high * margin
    axes.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 1e4 else (1,)
    ticks = [m * 10.0**e for e in range(-4, 6) for m in steps if low <= m * 10.0**e <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], color=INK)
    axes.minorticks_off()
    axes.axvline(1, color=INK, linewidth=1.2, zorder=3)
    axes.grid(axis="x", color=FAINT, zorder=0)
    axes.tick_params(length=0)
    over = " over eager PyTorch" if EAGER in baselines else ""
    but = " where nothing else is named" if over and len(baselines) > 1 else ""
    axes.set_xlabel(f"speed-up{over}{but} (log scale, longer is faster)", color=INK)
    for side in axes.spines.values():
        side.set_visible(False)


def plot(results: dict[str, Any], path: Path) -> None:
    """Write the picture to `path`; the suffix chooses the format.

    Cases whose eager form (of a simulation: whose baseline) was not timed have no bar.

    Raises:
        ValueError: no case can be drawn, or a suffix that matplotlib does not write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [case for case in results["cases"] if _bars(case)]
    if not cases:
        raise ValueError("nothing to plot: no case has a timing of pygen or a peer beside the baseline's")
    height = sum(len(_bars(case)) * BAR + GAP for case in cases) + 1.6
    figure, axes = plt.subplots(figsize=(WIDTH, height))
    try:
        figure.subplots_adjust(
            left=_label_inches(cases) / WIDTH, right=0.97, top=1 - 0.85 / height, bottom=0.85 / height
        )
        _draw(axes, cases)
        title = "pygen benchmarks" + ("" if results["complete"] else " (interrupted run)")
        figure.text(0.02, 1 - 0.28 / height, title, fontsize=14, fontweight="bold", color=INK, va="center")
        figure.text(0.02, 0.16 / height, machine_line(results), fontsize=8, color=INK, va="center")
        figure.savefig(path, dpi=130, facecolor="white")
    finally:
        plt.close(figure)
