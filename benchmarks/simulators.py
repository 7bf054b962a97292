"""Other simulators of reaction networks, given a pygen network: what cases/ssa.py measures beside pygen's own.

Each function here turns a network into a `Sampler`. Compiling, where there is any, happens there and not in the calls.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pygen.ssa import Network
from pygen.ssa.expression import Number, evaluate, parse, substitute, to_text

# (trajectories, seed >= 1, parameters) -> counts, float64 [trajectories, T, S] in the order of net.species.
Sampler = Callable[[int, int, Mapping[str, float]], Tensor]

# From so many species on rebop is told to keep its reactions sparse: by itself it does not, and takes 20 times as long.
MANY_SPECIES = 50


def gillespy2(net: Network, grid: Tensor, *, variable: bool = False, optimize: bool = False) -> Sampler:
    """GillesPy2's C++ solver, compiled for this network. `grid` is uniform and begins at 0.

    Only a `variable` solver takes parameters; compiled-in constants are faster. GillesPy2 1.8 has g++ compile without
    optimisation and offers no way to ask for it; `optimize` adds -O3, which makes it several times as fast.

    Raises:
        ImportError: GillesPy2, or g++ and scons, with which it compiles, are not installed.
    """
    import gillespy2 as library
    from gillespy2.solvers.cpp.build.build_engine import BuildEngine

    missing = BuildEngine.get_missing_dependencies()
    if missing:
        raise ImportError(f"GillesPy2's C++ solver needs {' and '.join(missing)}")
    library.log.setLevel(logging.ERROR)
    model = library.Model(name="model")
    model.add_species([library.Species(name=s, initial_value=n, mode="discrete") for s, n in _initial(net).items()])
    values = _parameters(net)
    model.add_parameter([library.Parameter(name=name, expression=repr(value)) for name, value in values.items()])
    reactions = []
    for j, reaction in enumerate(net.reactions):
        law: dict[str, str] = {}
        if reaction.rate is None or sum(reaction.reactants.values()) > 2:  # its mass action ends at two reactants
            law["propensity_function"] = _law(net, j)
        elif reaction.rate in values and _pairs(net, j) == 1:
            law["rate"] = str(reaction.rate)
        else:
            law["rate"] = f"constant_{j}"
            model.add_parameter(library.Parameter(name=law["rate"], expression=repr(_constant(net, j))))
        reactions.append(library.Reaction(f"reaction_{j}", reaction.reactants, reaction.products, **law))
    model.add_reaction(reactions)
    model.timespan(library.TimeSpan(grid.cpu().numpy()))
    with _compiler_flag("-O3") if optimize else nullcontext():
        solver = library.SSACSolver(model=model, variable=variable)

    def sample(trajectories: int, seed: int, parameters: Mapping[str, float]) -> Tensor:
        results = solver.run(number_of_trajectories=trajectories, seed=seed, variables=dict(parameters))
        return _stack([[result[species] for species in net.species] for result in results])

    return sample


@contextmanager
def _compiler_flag(flag: str) -> Iterator[None]:
    """Within, the g++ that is found first is one that adds a flag."""
    path = os.environ["PATH"]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "g++"
        script.write_text(f'#!/bin/sh\nexec "{shutil.which("g++")}" {flag} "$@"\n')
        script.chmod(0o755)
        os.environ["PATH"] = folder + os.pathsep + path
        try:
            yield
        finally:
            os.environ["PATH"] = path


def rebop(net: Network, grid: Tensor) -> Sampler:
    """rebop, in Rust, without compilation. `grid` is uniform and begins at 0.

    Raises:
        ImportError: rebop is not installed.
    """
    import rebop as library

    initial, end, steps = _initial(net), grid[-1].item(), len(grid) - 1

    def system(parameters: Mapping[str, float]) -> library.Gillespie:
        built = library.Gillespie()
        for j, reaction in enumerate(net.reactions):
            law = _law(net, j) if reaction.rate is None else _constant(net, j, parameters)
            built.add_reaction(law, _repeated(reaction.reactants), _repeated(reaction.products))
        return built

    own = system({})

    def sample(trajectories: int, seed: int, parameters: Mapping[str, float]) -> Tensor:
        built = system(parameters) if parameters else own
        sparse = True if len(initial) >= MANY_SPECIES else None
        results = [built.run(initial, end, steps, rng=(seed, i), sparse=sparse) for i in range(trajectories)]
        return _stack([[result[species].values for species in net.species] for result in results])

    return sample


# ---- a network in other words


def _initial(net: Network) -> dict[str, int]:
    return {name: int(count) for name, count in zip(net.species, net.initial, strict=True)}


def _parameters(net: Network) -> dict[str, float]:
    return {name: float(value) for name, value in zip(net.parameters, net.parameter_values, strict=True)}


def _pairs(net: Network, j: int) -> int:
    """What divides c, for both peers count n (n - 1) where the combinatorial convention counts n (n - 1) / 2."""
    reactants = net.reactions[j].reactants
    return math.prod(map(math.factorial, reactants.values())) if net.mass_action == "combinatorial" else 1


def _constant(net: Network, j: int, parameters: Mapping[str, float] | None = None) -> float:
    """The constant of reaction j by which both peers multiply n! / (n - nu)!."""
    rate = evaluate(parse(net.reactions[j].rate or 0.0), _parameters(net) | dict(parameters or {}))
    return float(rate) / _pairs(net, j)


def _law(net: Network, j: int) -> str:
    """The whole law with numbers for parameters, which a compiler likes better."""
    return to_text(substitute(net.propensity(j), {name: Number(value) for name, value in _parameters(net).items()}))


def _repeated(side: Mapping[str, int]) -> list[str]:
    return [name for name, number in side.items() for _ in range(number)]


def _stack(columns: list[list[np.ndarray]]) -> Tensor:
    """[trajectory][species] arrays over time -> [trajectories, T, S]."""
    return torch.from_numpy(np.array(columns, dtype=np.float64)).transpose(1, 2)
