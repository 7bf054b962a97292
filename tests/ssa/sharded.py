"""Three processes that share ensembles; fails unless all of them have the bits of one process.

Run by test_sharding.py with the path of a file to meet at. It forks itself: importing torch once is enough. Groups of
one, two and three of the processes do the same work.
"""

import os
import signal
import sys
import warnings
from datetime import timedelta

import torch
from torch import distributed

from pygen.ssa import engine
from pygen.ssa.network import Network, Reaction
from pygen.ssa.simulate import SimulationWarning, simulate

T = (0.0, 0.5, 2.0)
EVERYTHING = ("moments", "covariance", "histogram", "first_passage")
SIZES = (1, 2, 7, 50)  # uneven shares, and more ranks than trajectories
NET = Network(
    {"A": 20, "B": 2**40},
    {"k": 0.5},
    [Reaction({"A": 1}, {"B": 1}, rate="k"), Reaction({}, {"A": 1}, propensity="2 / (1 + A)")],
)


def ensemble(n, **more):
    k = torch.linspace(0.1, 2, n).tolist()
    bins = {"B": [2**40 - 1, 2**40 + 5, 2**41]} if "histogram" in more.get("reduce", ()) else None
    return simulate(NET, T, n, 11, stop="A == 12", first=5, parameters={"k": k}, bins=bins, **more)


def check_reduced(mine, alone, n):
    for name in ("mean", "var", "covariance"):
        assert torch.equal(getattr(mine, name)().nan_to_num(-1), getattr(alone, name)().nan_to_num(-1)), (n, name)
    for name in ("A", "B"):
        for a, b in zip(mine.histogram(name), alone.histogram(name), strict=True):
            assert torch.equal(a, b), (n, name)
    assert torch.equal(mine.stop_time, alone.stop_time) and len(mine.stop_time) == n
    assert mine.status_counts == alone.status_counts and mine.n_events == alone.n_events
    assert mine.first == 5 and mine.trajectories == n


def check_share(mine, alone, n, group):
    begin = mine.first - 5
    assert torch.equal(mine.counts, alone.counts[begin : begin + mine.trajectories])
    assert torch.equal(mine.parameters, alone.parameters[begin : begin + mine.trajectories]) or n == 1
    whole = torch.zeros(n, dtype=torch.int64)
    whole[begin : begin + mine.trajectories] += 1
    distributed.all_reduce(whole, group=group)
    assert (whole == 1).all(), "every trajectory belongs to one rank"


def check_failure(rank, group):
    """A rank whose engine fails says why, and the others say that another one did."""
    original, said = engine.run_block, ""
    if rank == 1:

        def broken(*_, **__):
            raise RuntimeError("broken here")

        engine.run_block = broken
    try:
        ensemble(7, reduce="moments", group=group)
    except RuntimeError as error:
        said = str(error)
    engine.run_block = original
    assert said == ("broken here" if rank == 1 else "simulate: another rank failed; its own message says why")


def check_outsider(group):
    try:
        ensemble(7, group=group)
    except ValueError as error:
        assert "group" in str(error)
    else:
        raise AssertionError("a process outside the group must be refused")


def check_warning(rank, group):
    """Rank 0 alone counts, for all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SimulationWarning)
        run = simulate(NET, T, 7, 1, max_events=1, reduce="moments", group=group)
    assert run.status_counts["max_events"] == 7
    assert [str(one.message)[:37] for one in caught] == (["7 of 7 trajectories ended early: 7 ma"] if rank == 0 else [])


def main(store, rank):
    alone = {n: (ensemble(n, reduce=EVERYTHING), ensemble(n)) for n in SIZES}
    limit = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3, timeout=limit)
    for ranks in ([0], [0, 1], [0, 1, 2]):
        group = distributed.new_group(ranks)
        if rank not in ranks:
            check_outsider(group)
            continue
        # The default group is found without being given.
        given = {} if len(ranks) == 3 else {"group": group}
        for n in SIZES:
            check_reduced(ensemble(n, reduce=EVERYTHING, block_bytes=100, **given), alone[n][0], n)
            check_share(ensemble(n, **given), alone[n][1], n, group)
    check_failure(rank, distributed.group.WORLD)
    check_warning(rank, distributed.group.WORLD)
    distributed.destroy_process_group()


if __name__ == "__main__":
    children = []
    for rank in (1, 2):
        child = os.fork()
        if not child:
            main(sys.argv[1], rank)
            sys.exit(0)
        children.append(child)
    try:
        main(sys.argv[1], 0)
    except BaseException:
        for child in children:  # they would wait for this process
            os.kill(child, signal.SIGKILL)
        raise
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
