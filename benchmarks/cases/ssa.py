"""Exact stochastic simulation against GillesPy2's C++ solver and rebop. Targets: specs of ssa, "Targets".

Every case is one network on a grid of times. Each simulator runs as many trajectories in a call as take it some tenths
of a second (starting GillesPy2's process is then a few hundredths of it), on one thread; times are per trajectory. Who
computes other means than the closed form, the master equation or a sample of rebop's is wrong and not timed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygen import ssa
from pygen.benchmarks import simulators
from pygen.benchmarks.registry import OURS, Call, Case, Factory, Inputs, Target, Unavailable, register
from pygen.ssa.examples import MODELS

SEED, SEED_OF_TRUTH = 1, 2
POINTS = 101  # times on the grid
LARGEST_Z = 5.0  # standard errors; with at most some hundred means per case, noise alone never gets there
# GillesPy2 as it is installed compiles without optimisation: see simulators.py.
GILLESPY2, OPTIMIZED, REBOP = "gillespy2", "gillespy2 -O3", "rebop"
PEERS: dict[str, Callable[..., simulators.Sampler]] = {
    GILLESPY2: simulators.gillespy2,
    OPTIMIZED: partial(simulators.gillespy2, optimize=True),
    REBOP: simulators.rebop,
}


# ---- samples and what they are checked against


@dataclass(frozen=True)
class Sample:
    """What a simulator returns.

    counts: [N, T, S], rows of one parameter set after another; each the mean of `each` trajectories.
    """

    counts: Tensor
    each: int = 1
    events: float = 0.0  # of one unit of the case


@dataclass(frozen=True)
class Truth:
    """Mean and variance of a statistic of one trajectory, [sets, S].

    The statistic is the counts at the last time, where these are known exactly. Else it is the mean of the counts over
    the grid, and mean and variance are those of `trajectories` simulated by another program.
    """

    mean: Tensor
    variance: Tensor
    trajectories: float = math.inf

    def statistic(self, counts: Tensor) -> Tensor:
        counts = counts.double().cpu()
        return counts[:, -1] if math.isinf(self.trajectories) else counts.mean(1)


def largest_z(sample: Sample, truth: Truth) -> float:
    """How many standard errors the means are off, at most.

    Species of less than one copy on average are left out: the mean of some trajectories is not normal there.
    """
    species = truth.mean.size(1)
    if sample.counts.dim() != 3 or sample.counts.size(2) != species or (sample.each == 1 and sample.counts.min() < 0):
        return math.inf
    values = truth.statistic(sample.counts)
    # A peer may do the first few of many parameter sets.
    rows_per_set = values.size(0) if truth.mean.size(0) == 1 else SCAN_TRAJECTORIES
    means = values.view(-1, rows_per_set, species).mean(1)
    expected, variance = truth.mean[: len(means)], truth.variance[: len(means)]
    error = (variance * (1 / (rows_per_set * sample.each) + 1 / truth.trajectories)).sqrt()
    checked = (expected >= 1) & (variance > 0)
    return ((means - expected).abs() / error)[checked].max().item()


def _immigration_death_truth(immigration: Tensor, death: float, x0: int, t: float) -> Truth:
    """Binomial(x0, e^-mt) + Poisson(a (1 - e^-mt) / m); immigration: [sets]."""
    left = math.exp(-death * t)
    arrived = immigration.double() / death * (1 - left)
    return Truth((x0 * left + arrived)[:, None], (x0 * left * (1 - left) + arrived)[:, None])


def _closed_form(net: ssa.Network, grid: Tensor) -> Truth:
    immigration, death = net.parameter_values
    return _immigration_death_truth(torch.tensor([immigration]), death, int(net.initial[0]), grid[-1].item())


def _master_equation(net: ssa.Network, grid: Tensor) -> Truth:
    solution = ssa.solve_cme(net, grid[-1:], tolerance=1e-9)
    return Truth(torch.as_tensor(solution.mean()), torch.as_tensor(solution.std()).square())


def _sampled(trajectories: int) -> Callable[[ssa.Network, Tensor], Truth]:
    def truth(net: ssa.Network, grid: Tensor) -> Truth:
        try:
            sampler = simulators.rebop(net, grid)
        except ImportError:
            sampler = simulators.gillespy2(net, grid)
        means = sampler(trajectories, SEED_OF_TRUTH, {}).mean(1)
        return Truth(means.mean(0, keepdim=True), means.var(0, keepdim=True), trajectories)

    return truth


# ---- simulators as implementations


def _grid(end: float, build: Callable[[], ssa.Network], device_type: str = "cpu"):
    """Makes the inputs, the grid; refuses where the network's file is not there, or on the wrong device."""

    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        if device.type != device_type:
            raise Unavailable(
                "compares simulators on one core: --device cpu"
                if device_type == "cpu"
                else "as much work as only a GPU does quickly: --device cuda"
            )
        build()
        return Inputs((torch.linspace(0, end, POINTS, dtype=torch.float64, device=device),))

    return make


def _sample(run: ssa.Run, units: int) -> Sample:
    assert run.counts is not None
    return Sample(run.counts, events=run.total_events / units)


def _ours(build: Callable[[], ssa.Network], trajectories: int, threads: int = 1) -> Factory:
    def factory(inputs: Inputs) -> Call:
        net, grid = build(), inputs.tensors[0]

        def call() -> Sample:
            return _sample(ssa.simulate(net, grid, trajectories, SEED, threads=threads, progress=False), trajectories)

        return call

    return factory


def _peer(name: str, build: Callable[[], ssa.Network], trajectories: int) -> Factory:
    def factory(inputs: Inputs) -> Call:
        sampler = PEERS[name](build(), inputs.tensors[0])
        return lambda: Sample(sampler(trajectories, SEED, {}))

    return factory


def _reference(build: Callable[[], ssa.Network], truth: Callable[[ssa.Network, Tensor], Truth]) -> Factory:
    return lambda inputs: lambda: truth(build(), inputs.tensors[0])


def _case(name: str, build: Callable[[], ssa.Network], truth: Factory, end: float = 0.0, **fields: Any) -> Case:
    """What all cases share; `fields` of Case come on top."""
    shared: dict[str, Any] = {
        "op": "ssa",
        "name": name,
        "shape": (POINTS,),
        "dtype": torch.float64,
        "make": _grid(end, build),
        "reference": truth,
        "tolerance": LARGEST_Z,
        "error": largest_z,
        "long": True,
        "overhead": True,  # on a GPU too: what simulate() takes, from its call to its results
        "weigh": None,
    }
    return Case(**(shared | fields))


def _throughput(
    name: str,
    build: Callable[[], ssa.Network],
    end: float,
    truth: Callable[[ssa.Network, Tensor], Truth],
    trajectories: Sequence[int],
    *targets: Target,
    peers: Sequence[str] = tuple(PEERS),
) -> Case:
    """Time per trajectory of everyone; `trajectories` of a call of ours and of each of the peers."""
    units = dict(zip((OURS, *peers), trajectories, strict=True))
    return _case(
        f"{name} to t = {end:g}",
        build,
        _reference(build, truth),
        end,
        implementations={OURS: _ours(build, units[OURS]), **{peer: _peer(peer, build, units[peer]) for peer in peers}},
        unit="trajectory",
        units=units,
        events=lambda sample: sample.events,
        baseline=peers[0] if peers else OURS,
        targets=targets,
    )


# ---- networks from files


def _file(name: str) -> Path:
    """A file of the real data that is not part of the repository; the tests look in the same places."""
    folder = Path(os.environ.get("PYGEN_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / name).is_file():
        raise Unavailable(f"no {name} in {folder}: set PYGEN_TEST_DATA to the folder of real data")
    return folder / name


def _heat_shock() -> ssa.Network:
    return ssa.read_stochkit(_file("heat_shock_stochkit.xml"))


def _egfr() -> ssa.Network:
    return ssa.read_bngl_net(_file("egfr_net.net"))


def _egfr_at_length() -> ssa.Network:
    """For GillesPy2, which compiles EGFR for minutes and then looks for what affects what for seconds in each run."""
    if not os.environ.get("PYGEN_BENCH_SLOW"):
        raise Unavailable("GillesPy2 takes ten minutes here: set PYGEN_BENCH_SLOW=1 to measure it")
    return _egfr()


# ---- more than one trajectory after another

SCAN_SETS, SCAN_TRAJECTORIES, SCAN_END, SCAN_PEER_SETS = 1000, 100, 10.0, 10
SCAN_DEATH, SCAN_X = 1.0, 100


def _scan_network() -> ssa.Network:
    return MODELS["immigration_death"](immigration=100.0, death=SCAN_DEATH, X=SCAN_X)


def _scan_values() -> Tensor:
    """Immigration rates from 50 to 150, in an order in which the first ten cover the range as well as all do."""
    return 50 + 100 * (torch.arange(SCAN_SETS) * 617 % SCAN_SETS + 0.5).double() / SCAN_SETS


def _our_scan(inputs: Inputs) -> Call:
    net, grid = _scan_network(), inputs.tensors[0]
    values = _scan_values().repeat_interleave(SCAN_TRAJECTORIES)

    def call() -> Sample:
        rows = {"immigration": values}
        run = ssa.simulate(net, grid, len(values), SEED, parameters=rows, threads=1, progress=False)
        return _sample(run, SCAN_SETS)

    return call


def _scan_by(name: str) -> Factory:
    """A call for each parameter set, as the peers offer it."""

    def factory(inputs: Inputs) -> Call:
        options = {} if name == REBOP else {"variable": True}
        sampler = PEERS[name](_scan_network(), inputs.tensors[0], **options)
        values = _scan_values()[:SCAN_PEER_SETS].tolist()

        def call() -> Sample:
            parts = [sampler(SCAN_TRAJECTORIES, SEED + i, {"immigration": a}) for i, a in enumerate(values)]
            return Sample(torch.cat(parts))

        return call

    return factory


def _scan_truth(inputs: Inputs) -> Call:
    return lambda: _immigration_death_truth(_scan_values(), SCAN_DEATH, SCAN_X, SCAN_END)


def _from_nothing(build: Callable[[], ssa.Network]) -> Factory:
    """Describe the network and simulate it once, every time anew."""

    def factory(inputs: Inputs) -> Call:
        return lambda: _sample(ssa.simulate(build(), inputs.tensors[0], 1, SEED, threads=1, progress=False), 1)

    return factory


def _peer_from_nothing(name: str, build: Callable[[], ssa.Network]) -> Factory:
    return lambda inputs: lambda: Sample(PEERS[name](build(), inputs.tensors[0])(1, SEED, {}))


def _start(name: str, build: Callable[[], ssa.Network], end: float, peers: Sequence[str], trajectories: int) -> Case:
    return _case(
        f"start to first result, {name}",
        build,
        _reference(build, _sampled(trajectories)),
        end,
        implementations={OURS: _from_nothing(build), **{peer: _peer_from_nothing(peer, build) for peer in peers}},
        baseline=peers[0],
        targets=(Target(None, at_most=0.05),),
    )


def _many_threads(build: Callable[[], ssa.Network], end: float, trajectories: int) -> Case:
    one = "one thread"
    return _case(
        f"immigration-death to t = {end:g}, two threads",
        build,
        _reference(build, _closed_form),
        end,
        implementations={OURS: _ours(build, trajectories, threads=2), one: _ours(build, trajectories)},
        unit="trajectory",
        units={OURS: trajectories, one: trajectories},
        events=lambda sample: sample.events,
        baseline=one,
        targets=(Target(one, at_least=1.9),),
    )


# ---- a million trajectories

MILLION = 1_000_000


def reduced(net: ssa.Network, grid: Tensor, trajectories: int) -> Sample:
    """Means of an ensemble of which no trajectory is kept."""
    run = ssa.simulate(net, grid, trajectories, SEED, device=grid.device, reduce="moments", threads=1, progress=False)
    return Sample(run.mean()[None], each=trajectories, events=run.total_events / trajectories)


def _peak_growth(call: Call, device: torch.device) -> int:
    """Resident memory that the same call needs at its peak, beyond what it finds, in a process of its own."""
    command = [sys.executable, "-m", "pygen.benchmarks.ssa_memory", str(MILLION)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)["growth"]


def _million(build: Callable[[], ssa.Network], device_type: str, end: float, *targets: Target) -> Case:
    return _case(
        f"immigration-death to t = {end:g}, 10^6 trajectories reduced",
        build,
        _reference(build, _closed_form),
        make=_grid(end, build, device_type),
        implementations={OURS: lambda inputs: lambda: reduced(build(), inputs.tensors[0], MILLION)},
        unit="trajectory",
        units={OURS: MILLION},
        events=lambda sample: sample.events,
        weigh=_peak_growth if device_type == "cpu" else None,
        targets=targets,
    )


MILLION_END = 0.1

# Trajectories of a call: of ours, of GillesPy2, of GillesPy2 with -O3, of rebop.
register(
    _throughput(
        "immigration-death",
        MODELS["immigration_death"],
        100,
        _closed_form,
        (256, 16, 64, 64),
        Target(GILLESPY2, 20),
        Target(None, at_least=150e6, of="events"),
    ),
    _throughput("dimer-decay", MODELS["dimer_decay"], 30, _sampled(64), (1024, 64, 256, 64), Target(GILLESPY2, 25)),
    _throughput(
        "Vilar oscillator", MODELS["vilar_oscillator"], 200, _sampled(16), (64, 2, 8, 8), Target(GILLESPY2, 25)
    ),
    _throughput("Schlogl", MODELS["schlogl"], 10, _master_equation, (512, 64, 256, 64)),
    _throughput("toggle switch", MODELS["toggle_switch"], 250, _master_equation, (2048, 400, 400, 200)),
    _throughput("brusselator", MODELS["brusselator"], 3, _sampled(32), (64, 8, 32, 16)),
    _throughput("heat shock", _heat_shock, 1, _sampled(16), (64, 8, 32, 4), Target(GILLESPY2, 10)),
    _throughput("EGFR", _egfr, 0.01, _sampled(8), (64, 1), peers=(REBOP,)),
    # Enough trajectories that GillesPy2's start is no more than a quarter of its time.
    _throughput("EGFR", _egfr_at_length, 0.1, _sampled(8), (64, 64), Target(OPTIMIZED, 5), peers=(OPTIMIZED,)),
    _start("Vilar oscillator", MODELS["vilar_oscillator"], 1, (GILLESPY2, REBOP), 64),
    _start("EGFR", _egfr, 1e-3, (REBOP,), 8),
    _many_threads(MODELS["immigration_death"], 100, 512),
    _case(
        f"immigration-death scan, {SCAN_SETS} parameter sets of {SCAN_TRAJECTORIES} trajectories",
        _scan_network,
        _scan_truth,
        SCAN_END,
        implementations={OURS: _our_scan, **{peer: _scan_by(peer) for peer in PEERS}},
        unit="parameter set",
        units={OURS: SCAN_SETS, **dict.fromkeys(PEERS, SCAN_PEER_SETS)},
        events=lambda sample: sample.events,
        baseline=GILLESPY2,
    ),
    _million(MODELS["immigration_death"], "cpu", MILLION_END, Target(None, at_most=200e6, of="memory")),
    _million(MODELS["immigration_death"], "cuda", 10, Target(None, at_least=1e10, of="events")),
)
