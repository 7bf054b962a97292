"""The progress bar of a run: share done, loss, best validation loss, the model's own metrics, samples per second.

Silent without rich.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class Bar(Protocol):
    def update(
        self, done: float, loss: float, best: float, samples_per_second: float, metrics: Mapping[str, float]
    ) -> None: ...


class _Silent:
    def update(
        self, done: float, loss: float, best: float, samples_per_second: float, metrics: Mapping[str, float]
    ) -> None:
        pass


class _Rich:
    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.task = progress.add_task("training", total=1.0, loss="", best="", rate="", metrics="")

    def update(
        self, done: float, loss: float, best: float, samples_per_second: float, metrics: Mapping[str, float]
    ) -> None:
        self.progress.update(
            self.task,
            completed=done,
            loss=f"{loss:.3f}",
            best=f"{best:.3f}" if math.isfinite(best) else "-",
            rate=f"{samples_per_second:,.0f}",
            metrics="".join(f"{name.replace('_', ' ')} {value:.4g}  " for name, value in metrics.items()),
        )


@contextlib.contextmanager
def progress_bar(show: bool) -> Iterator[Bar]:
    """A live bar on a terminal; nothing when `show` is false or rich is missing."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        show = False
    if not show:
        yield _Silent()
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn(
            "loss {task.fields[loss]}  best {task.fields[best]}  {task.fields[metrics]}{task.fields[rate]} samples/s"
        ),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, refresh_per_second=4) as progress:
        yield _Rich(progress)
