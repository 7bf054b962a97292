"""Writes runs to files and reads them back: npz, netCDF and zarr, csv; and hands them to xarray and pandas.

Every format holds the same named arrays with named dimensions, and one text of JSON for all that is not an array.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pygen.ssa import engine
from pygen.ssa.reduce import Histogram, Moments, Reduction
from pygen.ssa.run import Model, Origin, Run

if TYPE_CHECKING:
    import pandas
    import xarray

Arrays = dict[str, tuple[tuple[str, ...], np.ndarray]]  # dimensions and values, by name
_FORMAT = 1
_META = "pygen_run"
# What each ending needs: of every tuple one package.
_PACKAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    ".npz": (),
    ".nc": (("xarray",), ("h5netcdf", "netCDF4")),
    ".zarr": (("xarray",), ("zarr",)),
    ".csv": (("pandas",),),
}


# ---- a run as arrays and text


def _numpy(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


def _arrays(run: Run) -> Arrays:
    """All tensors of a run; those of counts share its memory."""
    arrays: Arrays = {"t": (("time",), _numpy(run.t)), "parameters": (("row", "parameter"), _numpy(run.parameters))}
    if run.counts is not None and run.status is not None and isinstance(run.n_events, Tensor):
        arrays["counts"] = ("trajectory", "time", "species"), _numpy(run.counts)
        arrays["status"] = ("trajectory",), _numpy(run.status)
        arrays["n_events"] = ("trajectory",), _numpy(run.n_events)
    if run.stop_time is not None:
        arrays["stop_time"] = ("trajectory",), _numpy(run.stop_time)
    if run.reduced is not None:
        if run.reduced.moments is not None:
            arrays.update({k: (d, _numpy(x)) for k, (d, x) in run.reduced.moments.arrays().items()})
        for k, (name, histogram) in enumerate(run.reduced.histograms.items()):
            del name  # a species' name may be none that a file can have
            arrays[f"cells_{k}"] = ("time", f"bin_{k}"), _numpy(histogram.cells)
            if histogram.edges is not None:
                arrays[f"edges_{k}"] = (f"edge_{k}",), histogram.edges
    return arrays


def _meta(run: Run) -> str:
    histograms = {} if run.reduced is None else run.reduced.histograms
    return json.dumps(
        {
            "format": _FORMAT,
            "species": run.species,
            "trajectories": run.trajectories,
            "status_counts": run.status_counts,
            "total_events": run.total_events,
            "interrupted": run.interrupted,
            "origin": asdict(run.origin),
            "model": asdict(run.model),
            "reduced": run.reduced is not None,
            "lows": [histogram.low for histogram in histograms.values()],
        }
    )


def _restore(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Run:
    """The run that `_arrays` and `_meta` took apart."""
    if meta["format"] != _FORMAT:
        raise ValueError(f"it has format {meta['format']}, this version of pygen reads {_FORMAT}")
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}
    species = tuple(meta["species"])
    reduced = None
    if meta["reduced"]:
        reduced = Reduction((), species, len(tensors["t"]), 0, {}, torch.device("cpu"))
        reduced.stop_time = tensors.get("stop_time")
        reduced.n_events = torch.tensor(meta["total_events"])
        reduced.status_counts = torch.tensor([meta["status_counts"][name] for name in engine.STATUS_NAMES])
        if "present" in tensors:
            reduced.moments = Moments.from_tensors(tensors)
        for k, low in enumerate(meta["lows"]):
            edges = arrays.get(f"edges_{k}")
            histogram = Histogram(species[k], len(tensors["t"]), edges, torch.device("cpu"))
            histogram.low, histogram.cells = low, tensors[f"cells_{k}"]
            reduced.histograms[species[k]] = histogram
    model: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in meta["model"].items()
    }
    return Run(
        t=tensors["t"],
        species=species,
        trajectories=meta["trajectories"],
        status_counts=meta["status_counts"],
        total_events=meta["total_events"],
        interrupted=meta["interrupted"],
        origin=Origin(**meta["origin"]),
        source=Model(**model),
        parameters=tensors["parameters"],
        counts=tensors.get("counts"),
        status=tensors.get("status"),
        n_events=tensors.get("n_events", meta["total_events"]),
        stop_time=tensors.get("stop_time"),
        reduced=reduced,
    )


# ---- other packages' objects


def to_xarray(run: Run, *, complete: bool = False) -> "xarray.Dataset":
    """See Run.to_xarray; `complete` adds what `load` needs to rebuild a reduced run."""
    import xarray

    arrays = _arrays(run)
    data: dict[str, Any] = {name: arrays[name] for name in ("counts", "status", "n_events") if name in arrays}
    coords: dict[str, Any] = {"time": _numpy(run.t), "species": list(run.species)}
    if "stop_time" in arrays:
        data["stop_time"] = arrays["stop_time"]
    if run.stop_time is not None:
        coords["trajectory"] = run.first + np.arange(len(run.stop_time))
    if run.parameters.size(1):
        coords["parameter"] = list(run.model.parameters)
        per_trajectory = run.counts is not None and len(run.parameters) > 1
        data["parameters"] = ("trajectory" if per_trajectory else "row", "parameter"), arrays["parameters"][1]
    if run.reduced is not None:
        data.update(_statistics(run, coords))
    if complete:
        data.update({name: values for name, values in arrays.items() if name not in (*data, "t", "parameters")})
    origin = run.origin
    attributes = {
        "network": run.model.name,
        "model": run.model.laws,
        "seed": origin.seed,
        "stream": origin.stream,
        "first": origin.first,
        "t0": origin.t0,
        "method": origin.method,
        "version": origin.version,
        "status_names": list(engine.STATUS_NAMES),
        _META: _meta(run),
    }
    return xarray.Dataset(data, coords, attributes)


def _statistics(run: Run, coords: dict[str, Any]) -> dict[str, Any]:
    """The statistics of a reduced run as variables; adds the axes of histograms to `coords`."""
    assert run.reduced is not None
    data: dict[str, Any] = {}
    if run.reduced.moments is not None:
        data["mean"] = ("time", "species"), run.mean().numpy()
        data["std"] = ("time", "species"), run.std().numpy()
        data["present"] = ("time",), run.present.numpy()
        if run.reduced.moments.cross:
            coords["other_species"] = list(run.species)
            data["covariance"] = ("time", "species", "other_species"), run.covariance().numpy()
    for name, histogram in run.reduced.histograms.items():
        axis = histogram.axis()
        coords[f"count_{name}"] = axis if histogram.edges is None else axis[:-1]  # lower ends of the bins
        data[f"histogram_{name}"] = ("time", f"count_{name}"), _numpy(histogram.cells)
    return data


def to_pandas(run: Run) -> "pandas.DataFrame":
    import pandas

    times = _numpy(run.t)
    if run.counts is not None:
        trajectories = run.first + np.arange(len(run.counts))
        index = pandas.MultiIndex.from_product((trajectories, times), names=("trajectory", "time"))
        return pandas.DataFrame(_numpy(run.counts).reshape(len(index), -1), index, list(run.species))
    index = pandas.MultiIndex.from_product((times, run.species), names=("time", "species"))
    n = np.repeat(run.present.numpy(), len(run.species))
    statistics = {"n": n, "mean": run.mean().numpy().ravel(), "std": run.std().numpy().ravel()}
    return pandas.DataFrame(statistics, index)


# ---- files


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block has ended well and removed when it has not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if path.is_dir():  # a zarr store: a folder cannot be renamed onto another
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def check_path(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """The path and its ending; raises what `save` and `load` would, before an hour is spent on what to save."""
    path = Path(path)
    if path.suffix not in _PACKAGES:
        raise ValueError(f"{path}: the name must end in one of {', '.join(_PACKAGES)}")
    for choices in _PACKAGES[path.suffix]:
        if not any(importlib.util.find_spec(package) for package in choices):
            raise ModuleNotFoundError(f"{path} needs {choices[0]}: pip install {choices[0]}", name=choices[0])
    return path, path.suffix


def save(run: Run, path: str | os.PathLike[str]) -> None:
    path, ending = check_path(path)
    with _complete(path) as temporary:
        if ending == ".npz":
            values = {name: array for name, (_, array) in _arrays(run).items()}
            np.savez(temporary, allow_pickle=False, **{_META: np.array(_meta(run))}, **values)
        elif ending == ".csv":
            to_pandas(run).to_csv(temporary)
        elif ending == ".nc":
            to_xarray(run, complete=True).to_netcdf(temporary)
        else:
            # Version 3 of the format has no text yet: it would warn.
            to_xarray(run, complete=True).to_zarr(temporary, zarr_format=2)


def _read_dataset(path: Path, engine_name: str | None) -> tuple[dict[str, np.ndarray], str]:
    import xarray

    with xarray.open_dataset(path, engine=engine_name, decode_times=False) as dataset:
        arrays = {str(name): variable.values for name, variable in dataset.variables.items()}
        arrays["t"] = arrays["time"]
        arrays.setdefault("parameters", np.zeros((1, 0)))
        return arrays, dataset.attrs[_META]


def load(path: str | os.PathLike[str]) -> Run:
    path, ending = check_path(path)
    if ending == ".csv":
        raise ValueError(f"{path}: a .csv holds too little to make a run again; save as .npz, .nc or .zarr")
    if not path.exists():
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        if ending == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays, meta = {name: file[name] for name in file.files}, str(file[_META])
        else:
            arrays, meta = _read_dataset(path, "zarr" if ending == ".zarr" else None)
        return _restore({n: a for n, a in arrays.items() if a.dtype.kind in "if"}, json.loads(meta))
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a run that pygen saved, or is damaged: {error}") from None
