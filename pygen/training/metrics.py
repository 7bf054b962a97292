"""`metrics.csv` of a run: one row per epoch, appended as it ends, so that a killed run keeps its history."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from pygen.training.checkpoint import write_atomically

COLUMNS = ("epoch", "step", "seconds", "loss", "valid", "learning_rate", "samples_per_second")


def start(path: Path, more: Sequence[str] = ()) -> None:
    """A file with the column names only: `COLUMNS`, and after them the model's."""
    write_atomically(path, (",".join((*COLUMNS, *more)) + "\n").encode())


def append(path: Path, row: Mapping[str, float]) -> None:
    with open(path, newline="") as file:
        columns = next(csv.reader(file))
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, columns).writerow(row)


def read(path: Path) -> list[dict[str, float]]:
    """The rows as numbers."""
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def truncate(path: Path, step: int, more: Sequence[str] = ()) -> None:
    """Drop the rows after `step`: a resumed run will write them again. `more` as in `start`."""
    if not path.exists():
        return start(path, more)
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, (*COLUMNS, *more))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
