"""What a simulation returns: trajectories, or what was kept of them, and the statistics of the ensemble.

simulate.py makes a Run, reduce.py computes its statistics, _store.py writes and reads it, _plot.py draws it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pygen.ssa import expression
from pygen.ssa.reduce import Histogram, Moments, Reduction, quantile_rank

if TYPE_CHECKING:
    from pygen.ssa.network import Network


@dataclass(frozen=True)
class Model:
    """What a run knows of its network; it survives saving.

    Args:
        name: of the network.
        laws: what was simulated, as Network.propensity_table() prints it.
        species: all of the network's.
        parameters: those that are numbers, in the order of the columns of Run.parameters.
        definitions: derived parameters, rules and observables as text; each uses only names of this object.
        changed: parameters that events assign to.
    """

    name: str
    laws: str
    species: tuple[str, ...]
    parameters: tuple[str, ...]
    definitions: Mapping[str, str]
    changed: tuple[str, ...]

    @classmethod
    def of(cls, net: "Network") -> "Model":
        trees = {**net.derived, **net.rules, **net.observables}
        texts = {name: expression.to_text(tree) for name, tree in trees.items()}
        changed = tuple(sorted(net.changed_parameters))
        return cls(net.name, str(net.propensity_table()), net.species, net.parameters, texts, changed)


@dataclass(frozen=True)
class Origin:
    """Where a run comes from: what its numbers depend on, and how long they took."""

    seed: int
    stream: int
    first: int  # index of the first trajectory of this run
    t0: float
    method: str
    device: str
    version: str  # of pygen
    seconds: float


@dataclass
class Run:
    """An ensemble of trajectories on a grid of times, or its statistics; made by `simulate`.

    Attributes:
        t: float64 [T], the grid.
        species: the K recorded species, in the order of the last axis.
        trajectories: how many were asked for; n below. On one of several ranks, its share of them, unless reduced.
        status_counts: for each status how many trajectories ended with it; status_names lists all.
        total_events: reactions that happened, in all trajectories together.
        interrupted: Ctrl-C came before all trajectories were finished.
        counts: int64 [n, T, K], row i is trajectory `first` + i; -1 where a trajectory never got. None if reduced.
        status: int8 [n], an index into status_names. None if reduced.
        n_events: int64 [n]; if reduced, the total.
        stop_time: float64 [n], when the stopping condition became true (first passage), inf where it did not. None if
            reduced to something else.

    Statistics leave out, at each time, the trajectories that have no value there; status_counts and a warning say how
    many these are.
    """

    t: Tensor
    species: tuple[str, ...]
    trajectories: int
    status_counts: dict[str, int]
    total_events: int
    interrupted: bool
    origin: Origin
    source: "Network | Model"
    parameters: Tensor  # float64 [1 or n, P]
    counts: Tensor | None = None
    status: Tensor | None = None
    n_events: Tensor | int = 0
    stop_time: Tensor | None = None
    reduced: Reduction | None = None

    @cached_property
    def model(self) -> Model:
        """What is known of the network; made when asked for, because it takes long for thousands of reactions."""
        return self.source if isinstance(self.source, Model) else Model.of(self.source)

    @property
    def status_names(self) -> tuple[str, ...]:
        return tuple(self.status_counts)

    @property
    def first(self) -> int:
        """The index of the first trajectory: that of row 0."""
        return self.origin.first

    @property
    def seed(self) -> int:
        return self.origin.seed

    @property
    def elapsed(self) -> float:
        """Seconds that the simulation took."""
        return self.origin.seconds

    @property
    def events_per_second(self) -> float:
        return self.total_events / max(self.origin.seconds, 1e-9)

    # ---- statistics

    def _trajectories(self, what: str) -> Tensor:
        if self.counts is None:
            raise ValueError(f"{what} needs trajectories, and this run kept none: simulate without reduce=")
        return self.counts

    @cached_property
    def _exact_moments(self) -> Moments:
        if self.reduced is not None:
            if self.reduced.moments is None:
                raise ValueError('this run kept no moments: simulate with reduce="moments", or without reduce=')
            return self.reduced.moments
        counts = self._trajectories("a moment")
        moments = Moments(len(self.t), len(self.species), False, counts.device)
        moments.add(counts)
        return moments

    @cached_property
    def _exact_products(self) -> Moments:
        if self.reduced is not None:
            if self.reduced.moments is None or not self.reduced.moments.cross:
                raise ValueError('this run kept no covariances: simulate with reduce="covariance", or without reduce=')
            return self.reduced.moments
        counts = self._trajectories("a covariance")
        moments = Moments(len(self.t), len(self.species), True, counts.device)
        moments.add(counts)
        return moments

    @property
    def present(self) -> Tensor:
        """int64 [T]: how many trajectories have a value at each time."""
        if self.reduced is not None and self.reduced.moments is None and self.reduced.histograms:
            unit = [one for one in self.reduced.histograms.values() if one.edges is None]
            if unit:
                return unit[0].cells.sum(1).cpu()
        return self._exact_moments.present.cpu()

    def mean(self) -> Tensor:
        """The mean of every species at every time, float64 [T, K]: the exact integer sum divided once."""
        return torch.from_numpy(self._exact_moments.mean())

    def var(self) -> Tensor:
        """The unbiased variance (divided by n - 1), float64 [T, K], from exact integer sums."""
        return torch.from_numpy(self._exact_moments.variance())

    def std(self) -> Tensor:
        """The square root of `var`, float64 [T, K]."""
        return self.var().sqrt()

    def covariance(self) -> Tensor:
        """The unbiased covariance of every two species at every time, float64 [T, K, K], from exact integer sums."""
        return torch.from_numpy(self._exact_products.covariance())

    def quantile(self, q: float | Sequence[float]) -> Tensor:
        """The smallest count v with P(count <= v) >= q, at every time: NumPy's method "inverted_cdf".

        Args:
            q: one number from 0 to 1, or several.

        Returns:
            float64 [T, K], or [len(q), T, K]: counts that occur, never something between two.

        Raises:
            ValueError: q outside [0, 1]; a reduced run without histograms of width 1.
        """
        several = np.atleast_1d(np.asarray(q, dtype=np.float64))
        if several.ndim != 1 or not ((several >= 0) & (several <= 1)).all():
            raise ValueError(f"quantile: q must be from 0 to 1, got {q}")
        qs = several.tolist()
        result = self._quantiles_of_counts(qs) if self.counts is not None else self._quantiles_of_bins(qs)
        return torch.from_numpy(result[0] if np.ndim(q) == 0 else result)

    def _quantiles_of_counts(self, qs: list[float]) -> np.ndarray:
        counts = self._trajectories("quantile")
        result = np.full((len(qs), len(self.t), len(self.species)), np.nan)
        for t in range(len(self.t)):
            now = counts[:, t]
            now = now[now[:, 0] >= 0].sort(dim=0).values
            if len(now):
                ranks = torch.tensor([quantile_rank(q, len(now)) - 1 for q in qs], device=now.device)
                result[:, t] = now[ranks].cpu().numpy()
        return result

    def _quantiles_of_bins(self, qs: list[float]) -> np.ndarray:
        histograms = self._kept_histograms()
        wide = [name for name, histogram in histograms.items() if histogram.edges is not None]
        if wide:
            raise ValueError(f"quantile needs bins of width 1; {', '.join(wide)} was given edges")
        return np.stack([np.stack([h.quantile(q) for h in histograms.values()], axis=-1) for q in qs])

    def _kept_histograms(self) -> Mapping[str, Histogram]:
        if self.reduced is None or not self.reduced.histograms:
            raise ValueError('this run kept no histograms: simulate with reduce="histogram", or without reduce=')
        return self.reduced.histograms

    def histogram(self, name: str) -> tuple[Tensor, Tensor]:
        """How many trajectories have each count of one species.

        Returns:
            values int64 [B], all integers from the smallest to the largest count of the run, and numbers of
            trajectories int64 [T, B]; or edges float64 [B + 1] and numbers [T, B] where `bins` gave edges.
        """
        column = self._column(name)
        if self.counts is None:
            histogram = self._kept_histograms()[name]
        else:
            histogram = Histogram(name, len(self.t), None, self.counts.device)
            histogram.add(self.counts[:, :, column])
        return torch.from_numpy(histogram.axis()), histogram.cells.cpu()

    def _column(self, name: str) -> int:
        if name not in self.species:
            known = "was not recorded" if name in self.model.species else "is not a species"
            raise ValueError(f"{name!r} {known}; there is: {', '.join(self.species)}")
        return self.species.index(name)

    # ---- expressions

    def __getitem__(self, formula: str) -> Tensor:
        """A species, rule, observable or any expression of them in every trajectory at every time.

        Args:
            formula: in the language of propensities: `run["A"]`, `run["A / (A + B)"]`, `run["k * A"]`. Parameters are
                those of each trajectory.

        Returns:
            float64 [n, T]; NaN where a trajectory never got.

        Raises:
            ValueError: a reduced run; a name that is unknown, was not recorded, or is a parameter that events change.
        """
        counts = self._trajectories(f"run[{formula!r}]")
        values: dict[str, Any] = {}
        tree = expression.parse(formula)
        for name in expression.symbols(tree):
            self._value(name, values)
        result = expression.evaluate(tree, values, time=self.t.numpy())
        result = torch.from_numpy(np.array(np.broadcast_to(result, counts.shape[:2]), dtype=np.float64))
        result[(counts[:, :, 0] < 0).cpu()] = torch.nan
        return result

    def _value(self, name: str, values: dict[str, Any]) -> Any:
        """The value of a name as float64 that broadcasts to [n, T]; kept in `values`."""
        if name in values:
            return values[name]
        if name in self.species:
            assert self.counts is not None
            value: Any = self.counts[:, :, self.species.index(name)].cpu().numpy().astype(np.float64)
        elif name in self.model.changed:
            raise ValueError(f"{name!r} is a parameter that events change: its value at each time was not recorded")
        elif name in self.model.parameters:
            value = self.parameters[:, self.model.parameters.index(name), None].cpu().numpy()
        elif name in self.model.definitions:
            tree = expression.parse(self.model.definitions[name])
            inner = {inside: self._value(inside, values) for inside in expression.symbols(tree)}
            value = expression.evaluate(tree, inner, time=self.t.numpy())
        elif name in self.model.species:
            raise ValueError(f"species {name!r} was not recorded; add it to record=")
        else:
            known = (*self.species, *self.model.parameters, *self.model.definitions)
            raise ValueError(f"unknown name {name!r}; there is: {', '.join(known)}")
        values[name] = value
        return value

    # ---- leaving pygen

    def to_xarray(self) -> Any:
        """An xarray.Dataset: `counts` (trajectory, time, species), `status`, `n_events`, `stop_time`; of a reduced run
        `mean`, `std`, `covariance` and histograms instead. Its attributes say how to compute it again.
        """
        from pygen.ssa import _store

        return _store.to_xarray(self)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame: one row per trajectory and time, one column per species; of a run reduced to moments one
        row per time and species with `n`, `mean` and `std`.
        """
        from pygen.ssa import _store

        return _store.to_pandas(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the run to a file, by its ending: .npz, .nc (netCDF), .zarr, or .csv (the table of `to_pandas`).

        The file appears when it is complete: it is written under a temporary name first. All but .csv can be loaded.
        """
        from pygen.ssa import _store

        _store.save(self, path)

    @staticmethod
    def load(path: str | PathLike[str]) -> "Run":
        """Read what `save` wrote.

        Raises:
            ValueError: not a file that `save` wrote. OSError: not there, or not readable.
        """
        from pygen.ssa import _store

        return _store.load(path)

    def plot(
        self,
        kind: str = "mean",
        *,
        species: str | Sequence[str] | None = None,
        at: float | None = None,
        path: str | PathLike[str] | None = None,
    ) -> Any:
        """Draw the run, one panel per species.

        Args:
            kind: "mean": the mean with the band between the 5% and 95% quantiles, and a few trajectories. Of a run
                reduced to moments the band is mean +- standard deviation. "trajectories": some trajectories, as the
                steps they are. "histogram": the distribution at one time.
            species: which; the first six recorded ones by default.
            at: the time of the histogram, the nearest one of the grid is taken; the last by default.
            path: also write the picture to this file, by its ending.

        Returns:
            The matplotlib Figure.
        """
        from pygen.ssa import _plot

        return _plot.plot(self, kind, species, at, path)

    def __repr__(self) -> str:
        kept = "" if self.reduced is None else ", reduced"
        statuses = ", ".join(f"{n:,} {name}" for name, n in self.status_counts.items() if n) or "no trajectory"
        origin = self.origin
        return (
            f"<Run of {self.source.name!r}: {self.trajectories:,} trajectories x {len(self.t):,} times x "
            f"{len(self.species):,} species{kept}; seed {origin.seed}, {origin.method} on {origin.device}\n"
            f" {statuses}{' (interrupted)' if self.interrupted else ''}; {self.total_events:.4g} events in "
            f"{origin.seconds:.3g} s, {self.events_per_second:.3g}/s>"
        )


def load(path: str | PathLike[str]) -> Run:
    """Read a run that `Run.save` wrote: `ssa.load("run.npz")`."""
    return Run.load(path)
