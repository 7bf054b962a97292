"""The arguments that simulate and replay have in common, checked, and the engine set up with them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pygen.ssa import _arguments, engine
from pygen.ssa._watch import Watch
from pygen.ssa.network import Formula, Network
from pygen.ssa.run import Origin

METHODS = ("auto", "direct", "lane", "sparse", "tau")
# Up to about here a pass over all reactions, shared by all lanes, costs less than keeping sum trees. Measured on one
# machine in ns per reaction, direct / sparse: 160 reactions 75 / 153 (avx512), 90 / 132 (avx2), 131 / 148 (default);
# 320 reactions 139 / 187, 192 / 157, 265 / 172. Single trajectories fill one lane and would change over earlier.
MOST_REACTIONS_OF_DIRECT = 160


def choose_method(net: Network) -> str:
    """The exact method that `method="auto"` stands for: "direct", or "sparse" above 160 reactions.

    It depends on the network alone and on nothing measured, because the two use the same random numbers differently:
    the same call gives the same trajectories on every machine.
    """
    return "direct" if len(net.reactions) <= MOST_REACTIONS_OF_DIRECT else "sparse"


@dataclass(frozen=True)
class Setup:
    """One simulation, checked: what is common to all its blocks."""

    net: Network
    stop: Formula | None
    inputs: engine.Inputs  # on the CPU
    species: tuple[str, ...]  # recorded
    device: torch.device
    first: int
    trajectories: int

    def share(self, begin: int, end: int) -> "Setup":
        """Trajectories begin ... end - 1 of it alone, on the device."""
        inputs = self.inputs.rows(begin, end).to(self.device)
        return replace(self, inputs=inputs, first=self.first + begin, trajectories=end - begin)

    def origin(self, seconds: float) -> Origin:
        from pygen import __version__

        return Origin(
            seed=self.inputs.seed,
            stream=self.inputs.stream,
            first=self.first,
            t0=self.inputs.t0,
            method=self.inputs.method,
            device=str(self.device),
            version=__version__,
            seconds=seconds,
        )

    def allocate(self, rows: int, log_length: int = 0) -> engine.Block:
        return engine.allocate(rows, len(self.inputs.times), len(self.species), self.device, log_length)

    def run(self, watch: Watch, begin: int, out: engine.Block) -> None:
        """Simulate trajectories begin, begin + 1, ... into all rows of `out`."""
        rows = len(out.status)
        if rows == 0:
            return
        inputs = self.inputs.rows(begin, begin + rows)

        def work(control: Tensor) -> None:
            engine.run_block(self.net, self.stop, inputs, first=self.first + begin, out=out, control=control)

        watch.run(work, rows, self.device)


def prepare(
    net: Network,
    t: Any,
    n: int,
    *,
    seed: int,
    stream: int,
    first: int,
    t0: float,
    method: str,
    device: str | torch.device,
    parameters: Any,
    initial: Any,
    max_events: int | None,
    stop: Formula | None,
    record: Any,
    threads: int | None,
    tau_epsilon: float,
) -> Setup:
    """Check every argument; see `simulate`."""
    if not isinstance(net, Network):
        raise TypeError(f"net must be a pygen.ssa.Network, got {type(net).__name__}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < tau_epsilon < 1:
        raise ValueError(f"tau_epsilon must be between 0 and 1, got {tau_epsilon}")
    device = torch.device(device)
    engine.check_device(device)
    columns = _arguments.recorded(net.species, record)
    inputs = engine.Inputs(
        initial=torch.from_numpy(_arguments.initial_rows(net.species, net.initial, initial, n)),
        parameters=torch.from_numpy(_arguments.rows("parameters", net.parameters, net.parameter_values, parameters, n)),
        times=_arguments.grid(t, float(t0)),
        recorded=torch.tensor(columns, dtype=torch.int32),
        t0=float(t0),
        seed=_arguments.integer("seed", seed, 0, 1 << 32),
        stream=_arguments.integer("stream", stream, 0, 1 << 32),
        method=choose_method(net) if method == "auto" else method,
        tau_epsilon=float(tau_epsilon),
        max_events=-1 if max_events is None else _arguments.integer("max_events", max_events, 1, 1 << 62),
        threads=torch.get_num_threads() if threads is None else _arguments.integer("threads", threads, 1, 1 << 16),
    )
    first = _arguments.integer("first", first, 0, 1 << 62)
    species = tuple(net.species[column] for column in columns)
    net.program(stop)  # whatever is wrong with the condition or a law is said here
    return Setup(net, stop, inputs, species, device, first, n)
