"""Stochastic simulation of reaction networks: exact, in vector lanes, and the same bits on every machine.

    net = ssa.Network({"A": 100}, {"k": 0.5}, [ssa.Reaction({"A": 1}, {}, rate="k")])
    run = ssa.simulate(net, t=torch.linspace(0, 10, 11), trajectories=10_000, seed=1)

Networks: network.py (laws in expression.py), sbml.py, bngl.py, stochkit.py, examples.py. Simulation: simulate.py over
engine.py over csrc/. Results: run.py, reduce.py. Without sampling: cme.py. The tutorial is docs/ssa.md.
"""

from pygen.ssa import examples
from pygen.ssa._replay import Replay, replay
from pygen.ssa.bngl import read_bngl_net
from pygen.ssa.cme import CmeSolution, solve_cme
from pygen.ssa.network import Network
from pygen.ssa.reaction import Event, PropensityTable, Reaction
from pygen.ssa.run import Run, load
from pygen.ssa.sbml import read_sbml
from pygen.ssa.sbml_write import write_sbml
from pygen.ssa.simulate import SimulationWarning, simulate
from pygen.ssa.stationary import StationaryDistribution, stationary_distribution
from pygen.ssa.stochkit import read_stochkit

__all__ = [
    "CmeSolution",
    "Event",
    "Network",
    "PropensityTable",
    "Reaction",
    "Replay",
    "Run",
    "SimulationWarning",
    "StationaryDistribution",
    "examples",
    "load",
    "read_bngl_net",
    "read_sbml",
    "read_stochkit",
    "replay",
    "simulate",
    "solve_cme",
    "stationary_distribution",
    "write_sbml",
]
