"""Simulates ensembles of trajectories of a network; _replay.py shows single ones jump by jump.

network.py packs the network into a program, engine.py runs it over blocks of trajectories, run.py holds what came out.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pygen.ssa import _arguments, _collective, engine
from pygen.ssa._replay import Replay, replay
from pygen.ssa._setup import Setup, choose_method, prepare
from pygen.ssa._watch import Watch
from pygen.ssa.network import Formula, Network
from pygen.ssa.reduce import Reduction
from pygen.ssa.run import Run

__all__ = ["Replay", "SimulationWarning", "choose_method", "replay", "simulate"]

REDUCTIONS = ("moments", "covariance", "histogram", "first_passage")
_BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
_LEAST_ROWS = {"cpu": 256, "cuda": 1 << 16}  # of a block, so that all lanes of all threads have work
_MOST_ROWS = 1 << 20

_WHAT_TO_DO = {
    "max_events": "raise max_events, or look at what makes the model so fast",
    "invalid_count": "a jump or an event made a count negative: let its law be 0 where reactants are missing",
    "overflow": "a count passed 2^53: the model explodes",
    "invalid_propensity": "a law was negative, NaN or infinite: see net.propensity_table()",
    "event_loop": "more than 1000 events at one instant: their triggers set each other off",
    "unfinished": "interrupted",
}


class SimulationWarning(UserWarning):
    """Some trajectories of a run did not reach the end of the grid."""


def simulate(
    net: Network,
    t: Any,
    trajectories: int,
    seed: int,
    *,
    method: str = "auto",
    device: str | torch.device = "cpu",
    parameters: Any = None,
    initial: Any = None,
    reduce: str | Sequence[str] | None = None,
    max_events: int | None = None,
    stop: Formula | None = None,
    stream: int = 0,
    first: int = 0,
    t0: float = 0.0,
    record: str | Sequence[str] | None = None,
    threads: int | None = None,
    progress: bool | None = None,
    bins: Mapping[str, Any] | None = None,
    tau_epsilon: float = 0.03,
    block_bytes: int | None = None,
    group: Any = None,
) -> Run:
    r"""Simulate many trajectories of a reaction network, exactly and reproducibly.

    In a state n the reaction j happens at the rate :math:`a_j(n)`. With :math:`a_0 = \sum_j a_j` and two random numbers
    u1, u2 the process waits

    .. math::
        \tau = -\log(u_1) / a_0, \qquad \text{then } j = \min \{ j : a_1 + \dots + a_j > u_2 a_0 \} \text{ happens.}

    The random numbers of trajectory i are a function of (seed, stream, i) and of how many it has used. Hence trajectory
    i is the same, bit for bit, on every machine and device, with any number of threads, trajectories and ranks, and on
    every grid of times.

    Args:
        net: the network.
        t: the times at which to record, ascending, repeats allowed, float64 [T]. The process starts at `t0` whatever
            the grid; at t_k stands the state before the first jump after t_k.
        trajectories: how many, n.
        seed: 0 <= seed < 2^32.
        method: "direct"; "sparse", for large networks; "auto", one of these two by the network's size (see
            `choose_method`); "lane", as "direct" but one trajectory at a time; "tau", adaptive tau-leaping, which is an
            approximation.
        device: "cpu" or "cuda".
        parameters: instead of the network's own: a mapping from names to numbers or arrays [n], or an array
            [n, P] in the order of net.parameters. A row for each trajectory.
        initial: the same for initial counts, integers.
        reduce: keep statistics instead of trajectories, in memory that does not depend on n: "moments" (mean and
            variance), "covariance" (these and covariances), "histogram" (quantiles too), "first_passage" (stop_time,
            [n]), or several of these.
        max_events: end a trajectory after so many reactions, with the status "max_events".
        stop: a condition, as "A == 0"; it ends a trajectory when it becomes true, and stop_time says when. The rest of
            the grid holds the state at that time.
        stream: 0 <= stream < 2^32: another value, independent trajectories of the same seed.
        first: index of the first trajectory: indices first ... first + n - 1 are simulated.
        t0: the time at which the process starts.
        record: the species to record; all by default.
        threads: of the CPU; torch.get_num_threads() by default.
        progress: draw a progress bar: True, False, or None: on a terminal, after two seconds.
        bins: for reduce="histogram": edges for the species named; the others have a bin for each integer.
        tau_epsilon: for method="tau": the largest relative change of a propensity in one leap.
        block_bytes: memory for counts of a reduced run at one time; 32 MiB (512 MiB on a GPU) by default.
        group: a process group to share the trajectories over; torch.distributed's default group where there is one.
            Every rank simulates a contiguous share. A reduced run is the same on every rank, and bit for bit the run of
            one process; otherwise a rank's run holds its share, from index run.first on.

    Returns:
        A `Run`. Ctrl-C ends the simulation early and returns what is finished, with run.interrupted set; a second one
        raises KeyboardInterrupt. Where trajectories differ in length, the short ones are finished first: statistics of
        an interrupted run lean towards them.

    Raises:
        ValueError, TypeError: an argument is wrong; the sentence says which and why.
        RuntimeError: the device has no engine here.

    Warns:
        SimulationWarning: some trajectories ended early; how many, why, and what to do.

    Example:
        >>> from pygen import ssa
        >>> net = ssa.Network({"A": 100}, {"k": 0.5}, [ssa.Reaction({"A": 1}, {}, rate="k")])
        >>> run = ssa.simulate(net, t=[0, 1, 2], trajectories=1000, seed=1)
        >>> run.counts.shape
        torch.Size([1000, 3, 1])

    Source: Gillespie, "Exact stochastic simulation of coupled chemical reactions", J. Phys. Chem. 81, 1977; the random
    numbers: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; tau-leaping: Cao, Gillespie,
    Petzold, "Efficient step size selection for the tau-leaping simulation method", J. Chem. Phys. 124, 2006.
    """
    begun = time.perf_counter()
    n = _arguments.integer("trajectories", trajectories, 0, 1 << 62)
    wanted = _check_reduce(reduce, stop)
    setup = prepare(
        net,
        t,
        n,
        seed=seed,
        stream=stream,
        first=first,
        t0=t0,
        method=method,
        device=device,
        parameters=parameters,
        initial=initial,
        max_events=max_events,
        stop=stop,
        record=record,
        threads=threads,
        tau_epsilon=tau_epsilon,
    )
    edges = _arguments.edges(bins, setup.species)
    if edges and "histogram" not in wanted:
        raise ValueError('bins belongs to reduce="histogram"')
    if block_bytes is not None:
        block_bytes = _arguments.integer("block_bytes", block_bytes, 1, 1 << 62)
    group = _collective.find_group(group)
    rank, ranks = _collective.rank_and_size(group)
    begin, end = (n * r // ranks for r in (rank, rank + 1))
    share = setup.share(begin, end)
    with Watch(share.trajectories, progress if rank == 0 else False) as watch:
        if wanted:
            reduction = Reduction(
                wanted, setup.species, len(setup.inputs.times), share.trajectories, edges, setup.device
            )
            interrupted = _reduce_blocks(share, reduction, watch, block_bytes, group)
            reduction.merge(group, begin, n)
            kept = _of_reduction(reduction)
        else:
            out = share.allocate(share.trajectories)
            share.run(watch, 0, out)
            interrupted = watch.interrupted
            kept = _of_trajectories(out)
    whole = setup if wanted else share
    run = Run(
        t=setup.inputs.times,
        species=setup.species,
        trajectories=whole.trajectories,
        interrupted=interrupted,
        origin=whole.origin(time.perf_counter() - begun),
        source=net,
        parameters=whole.inputs.parameters.cpu(),
        **kept,
    )
    if rank == 0 or not wanted:
        _warn(run)
    return run


def _reduce_blocks(setup: Setup, reduction: Reduction, watch: Watch, block_bytes: int | None, group: Any) -> bool:
    """Simulate block after block into the same memory and add each to the reduction; returns whether interrupted."""
    kind, n = setup.device.type, setup.trajectories
    least = 1 if block_bytes else _LEAST_ROWS[kind]
    bytes_per_row = 8 * len(setup.inputs.times) * len(setup.species)
    rows = min(max((block_bytes or _BLOCK_BYTES[kind]) // bytes_per_row, least), _MOST_ROWS, n)
    failure: Exception | None = None
    done = 0
    try:
        block = setup.allocate(rows)
        while done < n and not watch.interrupted:
            part = block.first_rows(min(rows, n - done))
            setup.run(watch, done, part)
            reduction.add(part, done)
            done += len(part.status)
    except Exception as error:
        failure = error
    reduction.status_counts[engine.UNFINISHED] += n - done
    # A rank that failed must not leave the others waiting for its sums.
    flags = torch.tensor([failure is not None, watch.interrupted], dtype=torch.int64)
    failed, interrupted = _collective.max_over_ranks(flags, group).tolist()
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError("simulate: another rank failed; its own message says why")
    return bool(interrupted)


def _of_reduction(reduction: Reduction) -> dict[str, Any]:
    """The fields of a Run that keeps statistics."""
    return {
        "status_counts": dict(zip(engine.STATUS_NAMES, reduction.status_counts.tolist(), strict=True)),
        "n_events": int(reduction.n_events),
        "total_events": int(reduction.n_events),
        "stop_time": reduction.stop_time,
        "reduced": reduction,
    }


def _of_trajectories(block: engine.Block) -> dict[str, Any]:
    """The fields of a Run that keeps trajectories."""
    numbers = block.status.long().bincount(minlength=len(engine.STATUS_NAMES))
    return {
        "status_counts": dict(zip(engine.STATUS_NAMES, numbers.tolist(), strict=True)),
        "counts": block.counts,
        "status": block.status,
        "n_events": block.n_events,
        "total_events": int(block.n_events.sum()),
        "stop_time": block.stop_time,
    }


def _warn(run: Run) -> None:
    ended_early = {name: run.status_counts[name] for name in engine.STATUS_NAMES[engine.FINISHED :]}
    number = sum(ended_early.values())
    if number:
        reasons = "; ".join(f"{n} {name} ({_WHAT_TO_DO[name]})" for name, n in ended_early.items() if n)
        warnings.warn(
            f"{number} of {run.trajectories} trajectories ended early: {reasons}. Statistics leave them out from there "
            "on.",
            SimulationWarning,
            stacklevel=3,
        )


def _check_reduce(reduce: str | Sequence[str] | None, stop: Any) -> tuple[str, ...]:
    wanted = () if reduce is None else (reduce,) if isinstance(reduce, str) else tuple(reduce)
    for name in wanted:
        if name not in REDUCTIONS:
            raise ValueError(f"reduce must be None or some of {', '.join(REDUCTIONS)}, got {name!r}")
    if reduce is not None and not wanted:
        raise ValueError(f"reduce must be None or some of {', '.join(REDUCTIONS)}, got nothing")
    if "first_passage" in wanted and stop is None:
        raise ValueError('reduce="first_passage" needs a condition to pass: stop="A == 0"')
    return wanted
