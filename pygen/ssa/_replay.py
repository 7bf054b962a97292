"""Replays one trajectory of an ensemble jump by jump. simulate.py makes the ensembles."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pygen.ssa import _arguments, engine
from pygen.ssa._setup import Setup, choose_method, prepare
from pygen.ssa._watch import Watch
from pygen.ssa.network import Formula, Network

_EVENT_ROOM = 256  # in the log of a replay, at first


@dataclass(frozen=True)
class Replay:
    """Everything that happened in one trajectory, from `replay`.

    Attributes:
        time: float64 [n], when.
        reaction: int64 [n], what: an index into reaction_names.
        states: int64 [n + 1, S], the counts before the first and after every jump. Events of the network that happen at
            the same instant as one another all show the state after the last of them.
        reaction_names: of the R reactions, and behind them of the network's events.
        species: of the S columns.
        status: how the trajectory ended.
        t_end: the time up to which it was followed.
    """

    time: Tensor
    reaction: Tensor
    states: Tensor
    reaction_names: tuple[str, ...]
    species: tuple[str, ...]
    status: str
    t0: float
    t_end: float

    def plot(self, *, species: str | Sequence[str] | None = None, path: str | PathLike[str] | None = None) -> Any:
        """Draw the counts as steps over time, one panel per species; returns the matplotlib Figure.

        Args:
            species: which; the first six by default.
            path: also write the picture to this file.
        """
        from pygen.ssa import _plot

        return _plot.plot_replay(self, species, path)

    def __repr__(self) -> str:
        return (
            f"<Replay of {len(self.time):,} jumps of {len(self.species)} species from {self.t0:g} to {self.t_end:g}: "
            f"{self.status}>"
        )


def replay(
    net: Network,
    *,
    seed: int,
    trajectory: int,
    t: Any,
    method: str = "auto",
    parameters: Any = None,
    initial: Any = None,
    max_events: int | None = None,
    stop: Formula | None = None,
    stream: int = 0,
    first: int = 0,
    t0: float = 0.0,
) -> Replay:
    """Every jump of one trajectory of an ensemble: the one that `simulate` with the same arguments has at this index.

    Args:
        net, seed, parameters, initial, max_events, stop, stream, first, t0: as given to `simulate`; of arrays with a
            row per trajectory the row `trajectory - first` is taken.
        trajectory: its index, counted as in `simulate`: row i of a run has index run.first + i.
        t: the grid given to `simulate`, or its last time.
        method: as given to `simulate`: "auto", "direct", "lane" or "sparse".

    Returns:
        A `Replay`.

    Raises:
        ValueError: as `simulate`; method="tau", whose leaps are not single jumps.

    Example:
        >>> from pygen import ssa
        >>> net = ssa.Network({"A": 3}, {"k": 0.5}, [ssa.Reaction({"A": 1}, {}, rate="k")])
        >>> ssa.replay(net, seed=1, trajectory=17, t=1000.0).states[:, 0]
        tensor([3, 2, 1, 0])
    """
    if method == "tau":
        raise ValueError('replay: method "tau" leaps over jumps; there are no single ones to show')
    index = _arguments.integer("trajectory", trajectory, first, 1 << 62)
    times = _arguments.grid([t] if np.ndim(t) == 0 else t, float(t0))[-1:]
    given = {"parameters": parameters, "initial": initial}
    rows = {name: _row_of(net, name, value, index - first) for name, value in given.items()}
    setup = prepare(
        net,
        times,
        1,
        seed=seed,
        stream=stream,
        first=index,
        t0=t0,
        method={"auto": choose_method(net), "direct": "lane"}.get(method, method),
        device="cpu",
        max_events=max_events,
        stop=stop,
        record=None,
        threads=1,
        tau_epsilon=0.5,
        **rows,
    )
    if setup.inputs.method == "direct":  # what "auto" chose
        setup = replace(setup, inputs=replace(setup.inputs, method="lane"))
    if net.events and not engine.is_compiled():
        raise RuntimeError("replay of a network with events needs the compiled engine, which this build of pygen lacks")
    with Watch(1, None) as watch:
        return _replay(setup, watch)


def _row_of(net: Network, what: str, given: Any, row: int) -> Any:
    """One row [1, columns] of values that may have one per trajectory."""
    names, defaults = (net.parameters, net.parameter_values) if what == "parameters" else (net.species, net.initial)
    values = _arguments.rows(what, names, defaults, given, None)
    if len(values) == 1:
        return values
    if row >= len(values):
        raise ValueError(f"{what} has {len(values)} rows; trajectory - first = {row} is none of them")
    return values[row : row + 1]


def _replay(setup: Setup, watch: Watch) -> Replay:
    out = setup.allocate(1)
    setup.run(watch, 0, out)
    # How often events of the network fire is known only when there is room left in the log.
    length = int(out.n_events) + (_EVENT_ROOM if setup.net.events else 1)
    while not watch.interrupted:
        out = setup.allocate(1, length)
        setup.run(watch, 0, out)
        if out.log_reaction[-1] < 0:
            break
        length *= 2
    if watch.interrupted:
        raise KeyboardInterrupt
    used = int((out.log_reaction >= 0).sum())
    log_time, reaction = out.log_time[:used], out.log_reaction[:used].long()
    names = (*setup.net.reaction_names, *(event.name or f"event{k}" for k, event in enumerate(setup.net.events)))
    return Replay(
        time=log_time,
        reaction=reaction,
        states=_states(setup, watch, log_time, reaction),
        reaction_names=names,
        species=setup.species,
        status=engine.STATUS_NAMES[int(out.status)],
        t0=setup.inputs.t0,
        t_end=float(setup.inputs.times[-1]),
    )


def _states(setup: Setup, watch: Watch, log_time: Tensor, reaction: Tensor) -> Tensor:
    """int64 [n + 1, S] from the log: reactions add their change, after an event the engine is asked for the state."""
    changes = torch.from_numpy(setup.net.stoichiometry)
    n_reactions = len(changes)
    jumps = torch.zeros(len(reaction) + 1, len(setup.species), dtype=torch.int64)
    jumps[0] = setup.inputs.initial[0].long()
    is_jump = reaction < n_reactions
    jumps[1:][is_jump] = changes[reaction[is_jump]]
    states = jumps.cumsum(0)
    if is_jump.all():
        return states
    # A grid of the events' times: a grid changes nothing in a trajectory, and shows the state after all that is at t_k.
    events = (~is_jump).nonzero().flatten()
    instants = log_time[events].unique()
    asked = replace(setup, inputs=replace(setup.inputs, times=torch.cat((instants, setup.inputs.times))))
    out = asked.allocate(1)
    asked.run(watch, 0, out)
    # What all events so far have changed together, after each instant; nothing by an event that ended the trajectory.
    seen = out.counts[0, : len(instants)]
    shift = seen - states[torch.searchsorted(log_time, instants, right=True)]
    shift = shift[seen[:, 0] >= 0]
    first_event = events[torch.searchsorted(log_time[events], instants)][: len(shift)]
    jumps[first_event + 1] += shift.diff(dim=0, prepend=torch.zeros_like(shift[:1]))
    return jumps.cumsum(0)
