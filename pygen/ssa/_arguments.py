"""Checks what simulate and replay are given and turns it into the tensors that engine.Inputs holds."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST_COUNT = 2**53  # above it, float64 no longer tells neighbouring integers apart


def integer(what: str, value: Any, low: int, high: int) -> int:
    """value as an int with low <= value < high."""
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"{what} must be an integer, got {value!r}") from None
    if isinstance(value, bool) or not low <= number < high:
        raise ValueError(f"{what} must be an integer with {low} <= {what} < {high}, got {value!r}")
    return number


def grid(t: Any, t0: float) -> Tensor:
    """Times as float64 [T]: finite, ascending, not before t0."""
    if not math.isfinite(t0):
        raise ValueError(f"t0 must be finite, got {t0}")
    try:
        times = torch.as_tensor(t, dtype=torch.float64, device="cpu").detach().contiguous()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"t must be numbers, got {t!r}") from None
    if times.dim() != 1 or not len(times):
        raise ValueError(f"t must be one row of at least one time, got shape {tuple(times.shape)}")
    if not times.isfinite().all():
        raise ValueError("t must be finite")
    if (times.diff() < 0).any():
        raise ValueError("t must be ascending")
    if times[0] < t0:
        raise ValueError(f"t must not begin before the process does, at t0 = {t0:g}; got t[0] = {float(times[0]):g}")
    return times


def _numbers(what: str, value: Any) -> np.ndarray:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number or an array of numbers, got {value!r}") from None


def _unknown(what: str, unknown: Collection[str], known: Sequence[str]) -> ValueError:
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return ValueError(f"{what}: unknown {', '.join(map(repr, unknown))}; there is: {shown or 'none'}")


def rows(what: str, names: Sequence[str], defaults: np.ndarray, given: Any, n: int | None) -> np.ndarray:
    """One value per name and trajectory.

    Args:
        what: "parameters" or "initial", for messages.
        names: of the columns.
        defaults: [len(names)], where nothing is given.
        given: None; a mapping from names to numbers or arrays [n]; or an array [n, len(names)].
        n: number of trajectories; None takes any one length.

    Returns:
        float64 [1, len(names)] where all trajectories have the same values, else [n, len(names)].
    """
    if given is None:
        result = np.array(defaults, dtype=np.float64)[None]
    elif isinstance(given, Mapping):
        result = _from_mapping(what, names, defaults, given, n)
    else:
        result = _numbers(what, given)
        if result.ndim != 2 or result.shape[1] != len(names) or len(result) not in ((n, 1) if n else (len(result),)):
            raise ValueError(
                f"{what} must be a mapping from names, or an array of shape ({n if n else 'trajectories'}, "
                f"{len(names)}) in the order {', '.join(names)}; got shape {result.shape}"
            )
    bad = np.argwhere(np.isnan(result))
    if len(bad):
        raise ValueError(f"{what}: {names[bad[0, 1]]} is NaN{_of_row(result, bad[0, 0])}")
    return np.ascontiguousarray(result)


def _of_row(result: np.ndarray, row: int) -> str:
    return f" in trajectory {row}" if len(result) > 1 else ""


def _from_mapping(what: str, names: Sequence[str], defaults: np.ndarray, given: Mapping, n: int | None) -> np.ndarray:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise _unknown(what, unknown, names)
    columns = {name: _numbers(f"{what}[{name!r}]", value) for name, value in given.items()}
    lengths = {len(column) for column in columns.values() if column.ndim == 1}
    for name, column in columns.items():
        if column.ndim > 1 or (column.ndim == 1 and (len(lengths) > 1 if n is None else len(column) != n)):
            wanted = "one length for all names" if n is None else f"({n},), one value per trajectory"
            raise ValueError(f"{what}[{name!r}] must be a number or an array of {wanted}; got shape {column.shape}")
    result = np.array(defaults, dtype=np.float64)[None].repeat(max(lengths, default=1), axis=0)
    for name, column in columns.items():
        result[:, names.index(name)] = column
    return result


def initial_rows(names: Sequence[str], defaults: np.ndarray, given: Any, n: int | None) -> np.ndarray:
    """As `rows`, of counts: integers from 0 to 2^53."""
    result = rows("initial", names, defaults, given, n)
    bad = np.argwhere((result < 0) | (result > LARGEST_COUNT) | (result != np.floor(result)))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"initial: {names[column]} must be an integer from 0 to 2^53, got {result[row, column]:g}"
            f"{_of_row(result, row)}"
        )
    return result


def recorded(names: Sequence[str], record: Any) -> list[int]:
    """Indices of the species to record, in the order asked for; all of them by default."""
    if record is None:
        wanted: Sequence[str] = names
    else:
        wanted = [record] if isinstance(record, str) else list(record)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise _unknown("record", unknown, names)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"record names a species twice: {', '.join(wanted)}")
    if not wanted:
        raise ValueError("record must name at least one species")
    return [list(names).index(name) for name in wanted]


def edges(bins: Any, species: Sequence[str]) -> dict[str, np.ndarray]:
    """Edges of histogram bins for each species that has its own: float64 [B + 1], strictly ascending."""
    if bins is None:
        return {}
    if not isinstance(bins, Mapping):
        raise TypeError(f"bins must be a mapping from species to edges, got {bins!r}")
    unknown = [name for name in bins if name not in species]
    if unknown:
        raise _unknown("bins", unknown, species)
    result = {name: _numbers(f"bins[{name!r}]", value) for name, value in bins.items()}
    for name, values in result.items():
        if values.ndim != 1 or len(values) < 2 or not (np.isfinite(values).all() and (np.diff(values) > 0).all()):
            raise ValueError(f"bins[{name!r}] must be at least two finite edges, strictly ascending; got {values}")
    return result
